"""The study runs whole, stops anywhere and goes on, and its page shows what its files hold."""

import json
import re
from dataclasses import replace

import pytest

from performers.app import provenance
from performers.app.errors import Diverged, UserError
from studies.proteins import report, runs
from studies.proteins.presets import KERNELS, PRESETS
from studies.proteins.runs import planned_runs, run_study
from tests.studies.proteins.tiny import PRESET, data

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run_study(folder, data(), PRESET, name="tiny")
    return folder


def scores(folder):
    return {
        path.parent.name: json.loads(path.read_text())["scores"]
        for path in folder.glob("runs/*/result.json")
    }


def test_every_run_is_there(finished):
    assert sorted(scores(finished)) == sorted(run.name for run in planned_runs(PRESET))
    assert len(scores(finished)) == 11


def test_tables_hold_the_results(finished):
    text = (finished / "report.md").read_text()
    both = [scores(finished)[f"mlm-exact-seed{seed}"]["test"]["accuracy"] for seed in (0, 1)]
    mean = 100 * sum(both) / 2
    assert re.search(rf"\| masked \| Transformer \| {mean:.2f} ± ", text)
    tables = report.tables(json.loads((finished / "results.json").read_text()))
    assert list(tables) == [
        *("accuracy", "claims", "kernels", "concatenated", "contexts", "similarity", "pairs"),
    ]
    assert all(table.markdown() in text for table in tables.values())
    assert "10 of 10 runs" in text
    pictures = re.findall(r"\]\((.+?)\)", text)
    assert len(pictures) >= 5
    assert all((finished / path).exists() for path in pictures)


def test_contexts_leave_out_what_is_too_long(finished):
    rows = json.loads((finished / "contexts.json").read_text())["rows"]
    lengths = {row["attention"]: [] for row in rows}
    for row in rows:
        lengths[row["attention"]].append(row["length"])
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 0
    assert lengths["exact"] == [128]
    assert lengths["favor-relu"] == lengths["identity"] == [128, 256]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def test_stopped_anywhere_it_ends_the_same(finished, tmp_path, monkeypatch):
    short = replace(PRESET, long=None, context_lengths=(), learnt=0)
    first, second = (run.name for run in planned_runs(short)[:2])
    trained = runs.train_model
    resumed = []

    def train(*arguments, **options):
        resumed.append((arguments[1].name, options["resume"]))
        return trained(*arguments, **options)

    def kill(*arguments, **options):
        raise Killed

    def killed(report=lambda *work: None):
        with pytest.raises(Killed):
            run_study(tmp_path, data(), short, name="tiny", report=report)

    def kill_at_the_third_step(what, done, total, entry):
        if (what, done) == (f"training {first}", 3):
            raise Killed

    write = provenance.write_json

    def kill_before_the_result(path, content):
        if "result" in content:
            raise Killed
        write(path, content)

    monkeypatch.setattr(runs, "train_model", train)
    killed(kill_at_the_third_step)
    checkpoints = tmp_path / "runs" / first / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    with monkeypatch.context() as patched:
        patched.setattr(runs, "evaluate_model", kill)
        killed()
    assert not (tmp_path / "runs" / first / "result.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(provenance, "write_json", kill_before_the_result)
        killed()
    assert "1 of 10 runs" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "runs" / second / "config.json").exists()
    run_study(tmp_path, data(), short, name="tiny")
    begun = [(run.name, False) for run in planned_runs(short)]
    again = [(first, True), (second, True)]
    assert resumed == [begun[0], again[0], begun[1], again[1], *begun[2:]]
    assert scores(tmp_path) == scores(finished)


def test_a_training_that_diverges_is_noted_and_the_study_goes_on(tmp_path, monkeypatch):
    short = replace(
        PRESET, seeds=(0,), causal=(), kernels=(), long=None, context_lengths=(), learnt=0
    )
    trained = runs.train_model
    tried = []

    def train(sequences, folder, options, **more):
        tried.append(options.attention)
        if options.attention == "favor-relu":
            raise Diverged("the loss became nan at step 3; lower --learning-rate")
        return trained(sequences, folder, options, **more)

    monkeypatch.setattr(runs, "train_model", train)
    run_study(tmp_path, data(), short, name="tiny")
    text = (tmp_path / "report.md").read_text()
    assert "Performer-relu, masked, seed 0: no result; the loss became nan at step 3." in (
        text.replace("Performer-ReLU", "Performer-relu")
    )
    assert "| masked | Linformer |" in text
    assert "| masked | Performer" not in text
    run_study(tmp_path, data(), short, name="tiny")
    assert tried == ["exact", "favor-relu", "linformer"]


def test_some_attentions_run_with_the_first_seed_only():
    preset = replace(PRESET, once=("linformer",), causal=(), kernels=())
    names = [run.name for run in planned_runs(preset)]
    assert names == [
        *("mlm-exact-seed0", "mlm-favor-relu-seed0", "mlm-linformer-seed0"),
        *("mlm-exact-seed1", "mlm-favor-relu-seed1"),
    ]


def test_other_settings_are_refused(finished):
    with pytest.raises(UserError, match=r"other settings .*seeds"):
        run_study(finished, data(), replace(PRESET, seeds=(0,)), name="tiny")


def test_a_study_older_than_an_option_goes_on(finished):
    file = finished / "study.json"
    settings = file.read_text()
    older = json.loads(settings)
    for key in ("training", "long"):
        del older[key]["optimizer"]
    file.write_text(json.dumps(older))
    runs._check_same(file, PRESET, data(), "tiny")
    changed = replace(PRESET, training=replace(PRESET.training, optimizer="muon"))
    with pytest.raises(UserError, match=r"other settings \(training\)"):
        runs._check_same(file, changed, data(), "tiny")
    file.write_text(settings)


def test_all_seeds_of_one_come_before_the_next():
    planned = planned_runs(PRESET)
    assert [run.options.seed for run in planned] == [0] * 6 + [1] * 5
    assert [run.experiment for run in planned].count("kernels") == 1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_compare_like_with_like(name):
    preset = PRESETS[name]
    for run in planned_runs(preset):
        own = {"attention", "objective", "seed", "attention_options"}
        for key, value in preset.training.to_dict().items():
            assert key in own or getattr(run.options, key) == value
    assert len(preset.seeds) == 3
    assert set(preset.kernels) == set(KERNELS)


def test_cluster_is_the_papers_model():
    training = PRESETS["cluster"].training
    shape = (training.num_heads, training.num_layers, training.intermediate_size)
    assert shape == (8, 36, 1024)
    assert (training.hidden_size, training.max_length, training.num_features) == (512, 1024, 256)
