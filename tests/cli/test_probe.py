"""``performers probe`` on small models and proteins with labels."""

import json

import pytest

from performers.proteins.inputs.fasta import write_fasta
from performers.proteins.probe.options import PROBE_FEATURES
from tests.cli.commands import refusal, run
from tests.proteins.probe.probe_data import motif_records

RECORDS = motif_records(160)
FAST = ["--repeats", 2, "--min-count", 3]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "motifs.fasta"
    write_fasta(path, RECORDS)
    return path


def test_probe_writes_numbers_and_a_figure(masked, labelled, tmp_path):
    output = tmp_path / "new"
    arguments = ["--output", output, "--pooling", "mean-sd", *FAST]
    out, lines = run("probe", masked, labelled, *arguments)
    assert (output / "probe.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((output / "probe.json").read_text())
    assert found["model"] == str(masked)
    assert list(found["features"]) == [*PROBE_FEATURES]
    hidden = json.loads((masked / "config.json").read_text())["hidden_size"]
    # The standard deviations, and the logarithm of the length.
    assert found["features"]["embeddings"]["width"] == 2 * hidden + 1
    assert found["pooling"] == "mean-sd"
    assert found["features"]["dipeptides"]["metrics"]["accuracy"]["mean"] > 0.9
    assert found["groups"] == 40
    for name, row in found["features"].items():
        assert f"{name} " in out
        assert f"{row['metrics']['accuracy']['mean']:.3f} ±" in out
    assert "160 proteins in 40 groups, each with one of 2 labels; 2 splits" in out
    assert f"results: {output / 'probe.json'}" in out
    for words in ("hold the logarithm of the length", "one draw of weights (seed 0)", "a spread"):
        assert sum(words in note for note in found["notes"]) == 1
        assert sum(words in line for line in out.splitlines()) == 1
    assert out.count("the C chosen is the") == sum("the C chosen" in n for n in found["notes"])
    assert any("fitting" in line for line in lines)
    tables = [line for line in out.splitlines() if " ± " in line and not line.startswith("Note")]
    # Whole rows: of five features, two tables of three metrics, and differences from the first.
    assert len(tables) == 2 * 5 + 2 * 4
    assert max(map(len, tables)) <= 80


def test_labels_are_checked_before_the_model_is_loaded(masked, labelled, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("performers.proteins.model_folder.load_model", refuse)
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "labels.tsv"
    names = [record.name for record in RECORDS]
    command = ["probe", masked, labelled, "--output", "new", "--labels", table, *FAST]
    for content, words in (
        ("# made by hand\nq1\tx\n", f"in the labels such as 'q1' ({table}:2)"),
        (f"\n{names[0]}\tx\n", f"{table}:2: the 1 labelled proteins of the FASTA files have 1"),
        (
            "".join(f"{name}\t{'x' if n < 3 else 'y'}\n" for n, name in enumerate(names)),
            f"{table}: 0 of 2 labels have 3 proteins with and without them in each part",
        ),
    ):
        table.write_text(content)
        assert words in refusal(*command)
    assert not (tmp_path / "new").exists()


def test_tables_of_labels_and_groups_are_read(causal, labelled, tmp_path):
    labels, groups = tmp_path / "labels.tsv", tmp_path / "clusters.tsv"
    records = motif_records(len(RECORDS), both=True)
    with labels.open("w") as file:
        file.write("# forward\tthe motif as it is\n")
        for record in records:
            given = record.description.split()[0].removeprefix("labels=").strip(",")
            file.write(f"{record.name}\t{given}\n")
    groups.write_text("".join(f"c{n % 30}\t{record.name}\n" for n, record in enumerate(records)))
    arguments = ["--labels", labels, "--groups", groups, "--features", "composition,dipeptides"]
    out, _ = run("probe", causal, labelled, "--output", tmp_path / "new", *FAST, *arguments)
    found = json.loads((tmp_path / "new" / "probe.json").read_text())
    assert "each with any of 2 labels" in out
    assert found["labels"]["forward"]["name"] == "the motif as it is"
    assert found["groups"] == 30
    assert list(found["features"]) == ["composition", "dipeptides"]


def test_a_random_split_is_asked_for_and_said(masked, tmp_path):
    fasta = tmp_path / "x.fasta"
    records = motif_records(120)
    write_fasta(fasta, [type(r)(r.name, r.description.split()[0], r.sequence) for r in records])
    arguments = ["probe", masked, fasta, "--output", tmp_path / "new", *FAST]
    assert "mmseqs easy-cluster" in refusal(*arguments)
    assert not (tmp_path / "new").exists()
    short = ["--features", "composition", "--max-sequences", 100, "--max-length", 20]
    short += ["--min-count", 1]
    out, lines = run(*arguments, "--split", "random", *short)
    assert "relatives of the test sequences were trained on" in out
    assert "20 proteins not drawn left out" in lines
    assert "not drawn" not in out
    assert "100 sequences cropped to 18 residues" in lines
