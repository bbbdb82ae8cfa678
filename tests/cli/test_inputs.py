"""The model that commands read with by default."""

import numpy as np
import pytest

from performers.proteins.pretrained import PRETRAINED
from tests.cli.commands import refusal, run


@pytest.fixture
def default(masked, monkeypatch):
    """A small model in the place of the one that ships."""
    monkeypatch.setattr("performers.proteins.pretrained._FOLDER", masked)
    return masked


@pytest.mark.parametrize("named", [[], [PRETRAINED]], ids=["default", "named"])
def test_evaluate_without_a_model_reads_with_the_one_that_ships(default, fasta, named):
    assert run("evaluate", *named, fasta, "--json") == run("evaluate", default, fasta, "--json")


def test_embed_without_a_model_reads_with_the_one_that_ships(default, fasta, tmp_path):
    run("embed", fasta, "--output", tmp_path / "without.npz")
    run("embed", default, fasta, "--output", tmp_path / "with.npz")
    without, given = np.load(tmp_path / "without.npz"), np.load(tmp_path / "with.npz")
    assert np.array_equal(without["embeddings"], given["embeddings"])


def test_report_without_a_model_reads_with_the_one_that_ships(default, fasta, tmp_path):
    out, _ = run("report", fasta, "--output", tmp_path / "report", "--max-sequences", "5")
    assert (tmp_path / "report" / "report.html").is_file()
    assert "report.html" in out


@pytest.mark.parametrize("command", ["evaluate", "embed", "report"])
def test_a_first_argument_that_is_nothing_is_named(command, fasta, tmp_path):
    output = [] if command == "evaluate" else ["--output", tmp_path / "x.npz"]
    line = refusal(command, tmp_path / "modle", fasta, *output)
    assert line.startswith(f"{tmp_path / 'modle'}: no such file or folder")
    assert PRETRAINED in line


def test_a_model_alone_is_not_enough(masked):
    assert refusal("evaluate", masked) == "give at least one FASTA file after the model"
