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


@pytest.mark.parametrize("reads_relatives", [False, True])
def test_without_a_model_the_one_that_ships_reads(
    masked, fasta, monkeypatch, tmp_path, reads_relatives
):
    """A small model is in its place; with relatives it is another one."""
    name = READS_RELATIVES if reads_relatives else PRETRAINED
    (tmp_path / name).symlink_to(masked)
    monkeypatch.setattr("performers.proteins.embedded._DATA", tmp_path)
    options = []
    if reads_relatives:
        (tmp_path / "relatives.fasta").write_text(">r\nMRTAYLARHW\n")
        options = ["--relatives", tmp_path / "relatives.fasta", "--relatives-tokens", 120]
    found = []
    for number, model in enumerate(([], [name], [tmp_path / name])):
        metrics = json.loads(run("evaluate", *model, fasta, "--json", *options)[0])
        scores = run("score", *model, fasta, *options)[0]
        output = tmp_path / f"{number}.npz"
        run("embed", *model, fasta, "--output", output, *options)
        place = metrics.pop("provenance")["model"]
        found.append((metrics, place, scores, arrays(output)["embeddings"].tolist()))
    assert found[0] == found[1] == found[2]


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
