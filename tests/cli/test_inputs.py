"""The model that commands read with by default, and odd but legal FASTA files."""

import gzip
import json
import os
import threading

import numpy as np
import pytest

from performers.proteins.embedded import PRETRAINED, READS_RELATIVES
from tests.cli.commands import arrays, run
from tests.proteins.runs import proteins


@pytest.fixture
def default(masked, monkeypatch, tmp_path):
    """A small model in the place of the one that ships."""
    (tmp_path / PRETRAINED).symlink_to(masked)
    monkeypatch.setattr("performers.proteins.embedded._DATA", tmp_path)
    return tmp_path / PRETRAINED


@pytest.mark.parametrize("named", [[], [PRETRAINED]], ids=["default", "named"])
def test_without_a_model_the_one_that_ships_reads(default, fasta, named, tmp_path):
    found, expected = (
        json.loads(run("evaluate", *model, fasta, "--json")[0]) for model in (named, [default])
    )
    assert found.pop("provenance")["model"] == expected.pop("provenance")["model"]
    assert found == expected
    for model, place in ((named, "without.npz"), ([default], "with.npz")):
        run("embed", *model, fasta, "--output", tmp_path / place)
    without, given = arrays(tmp_path / "without.npz"), arrays(tmp_path / "with.npz")
    assert np.array_equal(without["embeddings"], given["embeddings"])


def test_with_relatives_another_one_reads(masked, fasta, monkeypatch, tmp_path):
    folder = tmp_path / READS_RELATIVES
    folder.symlink_to(masked)
    monkeypatch.setattr("performers.proteins.embedded._DATA", tmp_path)
    relatives = tmp_path / "relatives.fasta"
    relatives.write_text(">r\nMRTAYLARHW\n")
    options = ["--relatives", relatives, "--relatives-tokens", 120]
    found, expected = (
        run("evaluate", *model, fasta, *options, "--json")[0] for model in ([], [folder])
    )
    assert json.loads(found)["accuracy"] == json.loads(expected)["accuracy"]
    assert json.loads(found)["provenance"]["model"] == json.loads(expected)["provenance"]["model"]
    found, expected = (run("score", *model, fasta, *options)[0] for model in ([], [folder]))
    assert found == expected
    for number, model in enumerate(([], [folder])):
        run("embed", *model, fasta, *options, "--output", tmp_path / f"{number}.npz")
    found, expected = (arrays(tmp_path / f"{n}.npz")["embeddings"] for n in (0, 1))
    assert np.array_equal(found, expected)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_read_like_a_file(masked, fasta, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(fasta.read_bytes(),))
    writer.start()
    try:
        out, _ = run("evaluate", masked, pipe)
    finally:
        writer.join()
    assert out == run("evaluate", masked, fasta)[0]


def test_odd_but_legal_input_is_read_and_counted(masked, tmp_path):
    plain, odd = tmp_path / "plain.fasta", tmp_path / "odd.fasta.gz"
    sequences = proteins(3)
    plain.write_text("".join(f">p\n{letters}\n" for letters in [*sequences, "MKXU"]))
    text = "".join(f">p\r\n{letters.lower()}*\r\n" for letters in sequences) + ">p\r\nMKXU"
    odd.write_bytes(gzip.compress(text.encode()))
    _, lines = run("embed", masked, plain, "--output", tmp_path / "plain.npz")
    assert lines[0] == (
        "non-standard letters kept: U 1, X 1; 3 records repeat the name of an earlier one"
    )
    _, lines = run("embed", masked, odd, "--output", tmp_path / "odd.npz")
    assert lines[0] == (
        f"{sum(map(len, sequences))} lower-case letters read as upper case; 3 trailing '*' removed;"
        " non-standard letters kept: U 1, X 1; 3 records repeat the name of an earlier one"
    )
    expected, found = arrays(tmp_path / "plain.npz"), arrays(tmp_path / "odd.npz")
    assert found.keys() == {"names", "headers", "lengths", "embeddings"}
    for name in ("names", "lengths", "embeddings"):
        np.testing.assert_array_equal(found[name], expected[name])
