"""Linear probes: what they find, what they must not find, and what they report."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from performers.app.errors import UserError
from performers.proteins.probe.features import kmer_frequencies
from performers.proteins.probe.figure import probe_figure
from performers.proteins.probe.fit import fit_probe
from performers.proteins.probe.options import STRENGTHS, ProbeOptions
from performers.proteins.probe.run import run_probe
from performers.proteins.probe.splits import split_proteins
from performers.proteins.probe.task import ProbeTask, build_task
from tests.proteins.probe.probe_data import motif_records

QUICK = ProbeOptions(repeats=3, min_count=5, strengths=(1e-3, 1e-1))


def task_of(targets, groups, multiclass=False):
    targets = np.asarray(targets, dtype=bool)
    count, labels = targets.shape
    return ProbeTask(
        proteins=tuple(f"p{n}" for n in range(count)),
        sequences=("M",) * count,
        labels=tuple(f"l{n}" for n in range(labels)),
        targets=targets,
        groups=np.asarray(groups),
        multiclass=multiclass,
        label_names={},
        notes=(),
    )


@pytest.fixture(scope="module")
def motifs():
    task = build_task(motif_records())
    features = {
        name: kmer_frequencies(task.sequences, k) for name, k in (("2", 2), ("1", 1), ("3", 3))
    }
    return task, features, run_probe(features, task, QUICK)


def test_order_is_found_where_composition_cannot_tell(motifs):
    _, _, found = motifs
    metrics = {name: row["metrics"] for name, row in found["features"].items()}
    assert metrics["2"]["macro_auroc"]["mean"] > 0.97
    assert metrics["2"]["accuracy"]["mean"] > 0.9
    assert metrics["1"]["macro_auroc"]["mean"] < 0.7
    assert abs(found["majority_accuracy"]["mean"] - 0.5) < 0.15
    assert list(found["differences"]) == ["1", "3"]
    assert found["differences"]["1"]["accuracy"]["wins"] == 3


def test_differences_are_paired_by_split(motifs):
    _, _, found = motifs
    for name, row in found["differences"].items():
        for metric, difference in row.items():
            ours = np.array(found["features"]["2"]["metrics"][metric]["values"])
            theirs = np.array(found["features"][name]["metrics"][metric]["values"])
            np.testing.assert_allclose(difference["values"], ours - theirs)
            assert difference["mean"] == pytest.approx(np.mean(ours - theirs))
            assert difference["sd"] == pytest.approx(np.std(ours - theirs, ddof=1))


def test_results_are_json_and_repeatable(motifs):
    task, features, found = motifs
    assert json.loads(json.dumps(found, allow_nan=False))["features"] == found["features"]
    (again,) = run_probe({"1": features["1"]}, task, QUICK)["features"].values()
    assert again == found["features"]["1"]
    assert [split["seed"] for split in found["splits"]] == [0, 1, 2]
    assert found["labels"]["forward"]["share"] == pytest.approx(
        1 - found["labels"]["backward"]["share"]
    )
    for row in found["features"].values():
        assert set(row["strengths"]) <= set(QUICK.strengths)


def test_labels_that_may_be_several_have_no_accuracy():
    task = build_task(motif_records(both=True))
    assert not task.multiclass
    assert (task.targets.sum(1) == 0).any()
    assert (task.targets.sum(1) == 2).any()
    features = {"2": kmer_frequencies(task.sequences, 2)}
    found = run_probe(features, task, QUICK)
    assert "accuracy" not in found["features"]["2"]["metrics"]
    assert "majority_accuracy" not in found
    assert found["features"]["2"]["metrics"]["macro_average_precision"]["mean"] > 0.9


def test_families_are_memorised_by_a_random_split_alone():
    """Features and labels that only name the family tell nothing of a new family."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 8)
    signature = generator.normal(size=(60, 200))[groups]
    features = {"f": signature + 0.1 * generator.normal(size=signature.shape)}
    label = generator.permutation(np.arange(60) % 2)[groups].astype(bool)
    targets = np.stack([label, ~label], axis=1)
    options = ProbeOptions(repeats=4, min_count=5, strengths=(1e-3, 1e-1))
    by_family, at_random = (
        run_probe(features, task_of(targets, chosen, multiclass=True), options)
        for chosen in (groups, np.arange(480))
    )
    assert at_random["features"]["f"]["metrics"]["macro_auroc"]["mean"] > 0.95
    assert 0.25 < by_family["features"]["f"]["metrics"]["macro_auroc"]["mean"] < 0.75


def test_no_group_is_in_two_parts():
    groups = np.random.default_rng(1).integers(0, 50, 700)
    seen = set()
    for seed in range(5):
        split = split_proteins(groups, ProbeOptions(), seed)
        rows = np.concatenate(list(split.values()))
        assert sorted(rows) == list(range(700))
        train, validation, test = (set(groups[part].tolist()) for part in split.values())
        assert not train & validation
        assert not train & test
        assert not validation & test
        assert 0.14 * 700 < len(split["test"]) <= 0.2 * 700
        assert 0.06 * 700 < len(split["validation"]) <= 0.1 * 700
        seen.add(tuple(split["test"]))
    assert len(seen) == 5


def test_the_test_part_decides_nothing():
    """Neither scaling nor strength nor weights change with what is tested."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(400, 30))
    targets = features[:, :1] + 1.5 * generator.normal(size=(400, 1)) > 0
    split = split_proteins(np.arange(400), ProbeOptions(), 0)
    # Most labels flipped, so that a strength chosen on them would be the strongest penalty.
    flipped = targets.copy()
    flipped[split["test"]] ^= True
    # Far away, all the same way: the order of the scores stays, and a mean or a spread of all
    # proteins would not.
    moved = features.copy()
    moved[split["test"]] *= 1e3
    plain, other_labels, other_features = (
        fit_probe(table, labels, split, multiclass=False)
        for table, labels in ((features, targets), (features, flipped), (moved, targets))
    )
    assert min(STRENGTHS) < plain.strength < max(STRENGTHS)
    assert other_labels.strength == other_features.strength == plain.strength
    assert plain.metrics["macro_auroc"] > 0.6
    np.testing.assert_allclose(other_labels.auroc, 1 - plain.auroc)
    np.testing.assert_array_equal(other_features.auroc, plain.auroc)


def test_sparse_columns_are_taken_as_they_are():
    """Scaled by their spread, words that hardly occur would drown those that tell the label."""
    generator = np.random.default_rng(0)
    label = np.arange(400) % 2 == 0
    telling = (label ^ (generator.random(400) < 0.1))[:, None]
    rare = 0.02 * (generator.random((400, 3000)) < 0.005)
    matrix = sparse.csr_array(np.hstack([telling, rare]).astype(np.float32))
    split = split_proteins(np.arange(400), ProbeOptions(), 0)
    found = fit_probe(matrix, label[:, None], split, multiclass=False)
    expected = (telling[split["test"], 0] == label[split["test"]]).mean()
    assert found.metrics["macro_auroc"] > expected - 0.03


def test_a_strength_at_the_edge_is_said(motifs):
    task, features, found = motifs
    assert found["features"]["2"]["strengths"] == [0.1] * 3
    note = "2: the C chosen is the greatest tried, 0.1, in 3 of 3 splits"
    assert any(line.startswith(note) for line in found["notes"])
    noisy = {"2": features["2"] + 0.2 * np.random.default_rng(0).normal(size=(240, 400))}
    wide = ProbeOptions(repeats=2, min_count=5, strengths=(1e-9, 1e-3, 1e9))
    inside = run_probe(noisy, task, wide)
    assert inside["features"]["2"]["strengths"] == [1e-3] * 2
    assert not any("C chosen" in line for line in inside["notes"])
    single = ProbeOptions(repeats=1, min_count=5, strengths=(0.1,))
    assert run_probe({"2": features["2"]}, task, single)["notes"] == []


def test_what_limits_the_numbers_is_said(motifs):
    task, features, found = motifs
    assert any("overlap, so it is a spread, not a standard error" in n for n in found["notes"])
    assert not any("Gene Ontology" in note for note in found["notes"])
    for labels in (("GO:0003676", "other"), ("EC1-oxidoreductase", "not-an-enzyme")):
        named = replace(task, labels=labels, notes=("of the task",))
        options = ProbeOptions(repeats=1, min_count=5, strengths=(0.1,))
        notes = run_probe({"2": features["2"]}, named, options, notes=["given"])["notes"]
        assert notes[:2] == ["of the task", "given"]
        assert "partly inferred from sequence similarity" in notes[2]


def test_rare_labels_are_dropped_and_said_so():
    generator = np.random.default_rng(0)
    kind = np.arange(300) % 3
    kind[generator.permutation(300)[:4]] = 3
    task = task_of(np.eye(4)[kind], np.arange(300), multiclass=True)
    features = {"f": np.eye(4)[kind] + 0.1 * generator.normal(size=(300, 4))}
    found = run_probe(features, task, QUICK)
    assert set(found["dropped"]) == {"l3"}
    assert "proteins with it in a" in found["dropped"]["l3"]
    assert set(found["labels"]) == {"l0", "l1", "l2"}
    assert found["proteins"] == 296
    assert found["features"]["f"]["metrics"]["accuracy"]["mean"] == 1.0
    targets = np.zeros((200, 2), dtype=bool)
    targets[:, 0] = targets[::2, 1] = True
    options = ProbeOptions(min_count=5)
    often = run_probe({"f": targets.astype(float)}, task_of(targets, np.arange(200)), options)
    assert "proteins without it" in often["dropped"]["l0"]
    assert often["features"]["f"]["metrics"]["macro_auroc"]["mean"] == 1.0
    with pytest.raises(UserError, match=r"0 of 4 labels have 500 proteins .*--min-count"):
        run_probe(features, task, ProbeOptions(min_count=500))


def test_the_figure_has_a_panel_for_each_metric(motifs):
    task, features, found = motifs
    figure = probe_figure(found)
    names = ["accuracy", "macro F1", "average precision", "AUROC"]
    assert [ax.get_title() for ax in figure.axes] == names
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    means = [row["metrics"]["accuracy"]["mean"] for row in found["features"].values()]
    assert bars == pytest.approx(means)
    options = ProbeOptions(repeats=1, min_count=5, strengths=(1e-1,))
    single = run_probe({"2": features["2"]}, task, options)
    assert single["features"]["2"]["metrics"]["accuracy"]["sd"] is None
    assert single["differences"] == {}
    assert len(probe_figure(single).axes) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ProbeOptions(split="family"), "--split must be one of groups, random"),
        (lambda: ProbeOptions(repeats=0), "--repeats must be at least 1"),
        (lambda: ProbeOptions(min_count=0), "--min-count must be at least 1"),
        (
            lambda: split_proteins(np.repeat([0, 1], 5), ProbeOptions(), 0),
            "10 proteins in 2 groups, the largest of 5",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
