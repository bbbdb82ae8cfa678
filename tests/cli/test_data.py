"""``performers data``: corpora as streams, in parts, from the command line."""

import shutil

import pytest

from tests.cli.commands import refusal, run
from tests.proteins.corpus import stand_in
from tests.proteins.corpus.test_parts import trembl, uniref

FRACTIONS = [f"--{split}-fraction=0.1" for split in ("validation", "test", "ood")]


@pytest.fixture(autouse=True)
def mmseqs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(stand_in.install(tmp_path / "bin")), prepend=":")


def test_parts_and_the_whole(tmp_path):
    path = uniref(tmp_path)
    whole, lines = run("data", "uniref50", path, "--output", tmp_path / "whole", *FRACTIONS)
    assert "reading sequences" in lines
    parts = [tmp_path / "1", tmp_path / "2"]
    for part in parts:
        command = ["data", "uniref50", path, "--part", f"{part.name}/2", "--output", part]
        out, lines = run(*command, *FRACTIONS)
        assert out == ""
        assert lines[-1].startswith(f"part {part.name} of 2 is in ")
        assert "is not empty" in refusal(*command, *FRACTIONS)
        run(*command, *FRACTIONS, "--resume")
    merged = ["data", "merge", *parts, "--output", tmp_path / "merged"]
    assert run(*merged)[0] == whole
    assert "is not empty" in refusal(*merged)
    assert "the corpus is there already" in run(*merged, "--resume")[1]
    line = refusal("data", "merge", *parts, "--output", parts[0], "--resume")
    assert "is one of the parts" in line


def test_what_is_refused(tmp_path):
    path, table = trembl(tmp_path)
    out = ["--output", tmp_path / "out"]
    for arguments, words in (
        (["trembl", path], "--clusters is missing: TrEMBL's headers name no cluster"),
        (["trembl", path, "--clusters", table, "--part", "3/2"], "parts are counted from 1 to 2"),
        (["uniref50", tmp_path / "none"], "none does not exist"),
        (["uniref50", "-"], "- does not exist"),
        (["uniref50", path, "--part", "1/2"], "the record S000 names no cluster"),
        (["trembl", path, "--clusters", tmp_path / "no"], "is no file; check the path"),
    ):
        assert words in refusal("data", *arguments, *out)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
