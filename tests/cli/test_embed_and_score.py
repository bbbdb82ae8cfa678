"""``performers embed`` and ``score``: their files, inputs and refusals."""

import json
import math

import h5py
import numpy as np
import pytest

from performers.proteins import load
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from tests.cli.commands import arrays, refusal, run
from tests.proteins.runs import make_model_folder

TEXT = ">sp|P1|ONE_HUMAN first\nMKTAY\n>bad\nMK-\n>b\nXW\n"


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "x.fasta"
    path.write_text(TEXT)
    return path


def cells(text):
    return [line.split("\t") for line in text.splitlines()]


def test_residues_are_embedded_into_hdf5(masked, fasta, tmp_path):
    output = tmp_path / "x.h5"
    assert "x.fasta:4: illegal letter '-' in the record 'bad'" in refusal(
        "embed", masked, fasta, "--output", output, "--per-residue"
    )
    assert not output.exists()
    options = ["--per-residue", "--skip-invalid", "--layer", 1, "--batch-tokens", 1]
    _, lines = run("embed", masked, fasta, "--output", output, *options)
    assert lines[-2:] == [
        f"1 record skipped: illegal letter '-' 1 (first at {fasta}:4)",
        f"7 vectors of width 16 in {output}",
    ]
    expected = load(masked).embed(["MKTAY", "XW"], per_residue=True, layer=1)
    with h5py.File(output) as file:
        assert {name: data.shape for name, data in file.items()} == {"P1": (5, 16), "b": (2, 16)}
        for data, vectors in zip(file.values(), expected, strict=True):
            np.testing.assert_allclose(data[()], vectors, atol=2e-5)
        assert file["P1"].attrs["header"] == "sp|P1|ONE_HUMAN first"


def test_scores_are_tables_and_json(masked, fasta, tmp_path):
    tables = tmp_path / "r.tsv", tmp_path / "s.tsv"
    arguments = ["score", masked, fasta, "--skip-invalid"]
    out, _ = run(*arguments, "--residues", tables[0], "--substitutions", tables[1])
    expected = load(masked).score(["MKTAY", "XW"], substitutions=True)
    rows = cells(out)
    assert rows[0] == ["name", "length", "log_likelihood", "mean", "perplexity"]
    assert [row[:2] for row in rows[1:]] == [["P1", "5"], ["b", "2"]]
    for row, score in zip(rows[1:], expected, strict=True):
        found = [score.log_likelihood, score.mean, math.exp(-score.mean)]
        np.testing.assert_allclose(np.array(row[2:], float), found, rtol=1e-4)
    residues, substitutions = (cells(path.read_text()) for path in tables)
    assert [row[:3] for row in residues[1:3]] == [["P1", "1", "M"], ["P1", "2", "K"]]
    assert substitutions[0] == ["name", "position", "residue", *AMINO_ACIDS]
    assert (len(residues), len(substitutions)) == (8, 8)
    np.testing.assert_allclose(
        np.array(substitutions[1][3:], float), expected[0].log_odds[0], atol=1e-3
    )
    assert substitutions[6] == ["b", "1", "X", *[""] * 20]
    run(*arguments, "--output", tmp_path / "x.json")
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["provenance"]["model"]["path"] == str(masked)
    first, second = content["proteins"]
    assert (first["name"], first["header"]) == ("P1", "sp|P1|ONE_HUMAN first")
    np.testing.assert_allclose(second["log_likelihoods"], expected[1].log_likelihoods, atol=1e-3)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("score {causal} {fasta} --method masked", "method is for masked models"),
        ("score {fasta} --method fast", "--method must be one of masked, one-pass; got 'fast'"),
        ("score {fasta} --residues x.csv", "--residues x.csv must end with .tsv"),
        ("score {fasta} --residues x.tsv --output x.tsv", "must be different files"),
        ("embed {fasta} --output x.h5 --per-residue --pooling mean-sd", "cannot be combined"),
        ("embed {fasta} --output x.csv", "must end with .npz or .parquet or .h5 or .tsv"),
        ("embed {fasta} --output x.h5 --dtype int8", "--dtype must be one of float32"),
        ("embed {fasta} --output x.h5 --device gpu", "device gpu is not available"),
        ("embed {fasta} --output x.h5 --layer 7", "layer must be 0"),
    ],
)
def test_mistakes_are_one_line(masked, causal, tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.fasta").write_text(">a\nMKT\n")
    first = "" if "{causal}" in command else f" {masked}"
    filled = command.replace("{fasta}", f"{first} p.fasta").format(causal=causal)
    assert words in refusal(*filled.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.fasta"]


@pytest.fixture(scope="module")
def family_model(tmp_path_factory):
    folder = make_model_folder(tmp_path_factory.mktemp("model") / "m", position_window=1)
    (folder / "training.json").write_text(json.dumps({"options": {"families": "all"}}))
    return folder


def test_proteins_are_read_with_relatives(family_model, masked, tmp_path):
    proteins, relatives = tmp_path / "p.fasta", tmp_path / "r.fasta"
    proteins.write_text(">a\nMKTAYIAK\n>b\nMKTAW\n")
    relatives.write_text(">x\nMRTAYLAR\n>y\nMKTAW\n")
    model = load(family_model)
    read = model.relatives(["MRTAYLAR", "MKTAW"], 25)
    options = ["--relatives", relatives, "--relatives-tokens", 25]
    counted = (
        "read with 1 to 2 relatives, 25 tokens at most; 1 that are the protein, or overlap with "
        "it whole, left out"
    )
    output = tmp_path / "x.npz"
    _, lines = run("embed", family_model, proteins, "--output", output, *options)
    assert lines[0] == counted
    expected = model.embed(["MKTAYIAK", "MKTAW"], relatives=read)
    np.testing.assert_allclose(arrays(output)["embeddings"], expected, atol=2e-5)
    out, lines = run("score", family_model, proteins, *options)
    assert lines[0] == counted
    scores = model.score(["MKTAYIAK", "MKTAW"], relatives=read)
    found = [float(row[2]) for row in cells(out)[1:]]
    np.testing.assert_allclose(found, [score.log_likelihood for score in scores], rtol=1e-4)
    out, lines = run("evaluate", family_model, proteins, "--json", *options)
    assert lines[0] == counted
    assert json.loads(out)["sequences"] == 2
    _, lines = run("score", masked, proteins, *options)
    assert lines[0] == (
        "masked was not trained on rows of relatives (performers train --families): do not expect "
        "it to read them"
    )


@pytest.mark.parametrize(
    ("command", "relatives", "options", "message"),
    [
        ("score", None, ["--relatives-tokens", 20], "--relatives-tokens needs --relatives"),
        ("evaluate", ">y family=A\nMKC\n", [], "'a' has no relative of the family 'a'"),
        ("evaluate", ">y\nMK\n", ["--max-length", 20], "with --relatives use --relatives-tokens"),
    ],
)
def test_relatives_that_cannot_be_used(
    family_model, tmp_path, command, relatives, options, message
):
    proteins, path = tmp_path / "p.fasta", tmp_path / "r.fasta"
    proteins.write_text(">a\nMKTAYIAK\n>b\nMKTAW\n")
    if relatives is not None:
        path.write_text(relatives)
        options = ["--relatives", path, *options]
    assert message in refusal(command, family_model, proteins, *options)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/data/x"), "/data/x: No space left on device"),
        (MemoryError(), "out of memory; lower --batch-tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        (ImportError("No module named 'pyarrow'"), "pip install 'performers[proteins]'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_machine_lacks_is_one_line(error, words, masked, fasta, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("performers.proteins.model.embed_sequences", fail)
    output = tmp_path / "x.npz"
    _, lines = run("embed", masked, fasta, "--skip-invalid", "--output", output, code=2)
    assert words in lines[-1]
    assert not output.exists()
