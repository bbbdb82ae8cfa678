"""The benchmark commands: what they write and print, and what they refuse."""

import json
import re

import pytest

from tests.benchmark.runs import break_backend, quick_floor, read_csv
from tests.cli.commands import refusal, run

QUICK = ["--repeats", 2, "--min-time", 0]
SHAPE = ["--heads", 2, "--head-dim", 8, "--num-features", 16]
ATTENTION = [
    "benchmark", "attention", *QUICK, *SHAPE, "--lengths", "16,32", "--directions", "causal",
]  # fmt: skip
CAUSAL = [*ATTENTION, "--no-memory", "--contestants", "performers torch,SDPA,identity"]
MODEL = ["benchmark", "model", *QUICK, "--no-memory", "--size", "small", "--lengths", "16"]
DECODE = ["benchmark", "decode", *QUICK, *SHAPE, "--contexts", "8,16", "--tokens", 2]
FILES = ["benchmark.png", "benchmark.svg", "results.csv", "results.json"]


@pytest.fixture(autouse=True)
def wide_terminal_and_quick_floor(monkeypatch):
    monkeypatch.setattr("performers.benchmark.cases.attention.measure_floor", quick_floor)
    monkeypatch.setenv("COLUMNS", "200")


def rows_of(folder):
    """The rows that a benchmark wrote, the same in both files."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    flat = read_csv((folder / "results.csv").read_text())
    assert [float(row["seconds"]) for row in flat] == [row["seconds"] for row in rows]
    return rows


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (MODEL, ["small model, clm", "identity", "favor-relu"]),
        (DECODE, ["layer", "exact KV cache", "state"]),
    ],
    ids=["model", "decode"],
)
def test_files_and_tables(arguments, words, tmp_path):
    out, lines = run(*arguments, "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert len(rows_of(tmp_path / "out")) >= 4
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["benchmark"] == arguments[1]
    assert all(word in out for word in words)
    assert "results.json" in out
    assert any(re.match(rf"benchmark {arguments[1]}: \d+ of \d+", line) for line in lines)


def test_memory_up_to_a_length_and_what_is_absent(tmp_path):
    out, lines = run(
        *ATTENTION, "--contestants", "identity,fla", "--passes", "forward",
        "--memory-max-length", 16, "--output", tmp_path,
    )  # fmt: skip
    assert lines[0].startswith("fla: ")
    short, long = rows_of(tmp_path)
    assert short["peak_bytes"] >= 0
    assert short["peak_method"] in ("VmHWM", "ru_maxrss")
    assert long["peak_bytes"] is None
    assert "memory" in out


def test_a_wrong_backend_ends_with_code_1_and_the_rest_is_written(tmp_path, monkeypatch):
    def attend(right, problem):
        out, state = right(problem)
        return out * 2, state

    break_backend(monkeypatch, "torch", attend)
    out, lines = run(*CAUSAL, "--output", tmp_path / "out", code=1)
    assert "failed: performers torch; wrong result: output differs" in lines[-1]
    assert "failed: wrong result" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


def test_ctrl_c_keeps_what_was_measured_and_resume_goes_on(tmp_path, monkeypatch):
    from performers.benchmark import measure as module

    measure, calls = module.measure_group, []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(module, "measure_group", interrupted)
        _, lines = run(*CAUSAL, "--output", tmp_path, code=130)
    assert "6 rows are in" in lines[-1]
    before = rows_of(tmp_path)
    assert len(before) == 6
    assert "--resume to continue" in refusal(*CAUSAL, "--output", tmp_path)
    _, lines = run(*CAUSAL, "--seed", 5, "--output", tmp_path, "--resume", code=2)
    assert "measured with seed 0, this is 5; give another folder" in lines[-1]
    out, lines = run(*CAUSAL, "--output", tmp_path, "--resume")
    assert lines[0].startswith("6 rows kept")
    rows = rows_of(tmp_path)
    assert len(rows) == 12
    assert all(row in rows for row in before)
    for words in ("causal, forward", "causal, forward+backward", "GFLOP/s", "SDPA"):
        assert words in out


@pytest.mark.parametrize(
    "arguments", [["attention", "--lengths", "a,b"], ["decode", "--contexts", ""]]
)
def test_lists_that_are_not_numbers_name_their_flag(arguments, tmp_path):
    """Ranges are tested with the settings."""
    line = refusal("benchmark", *arguments, "--output", tmp_path / "out")
    assert f"{arguments[1]} must be whole numbers" in line
    assert not (tmp_path / "out").exists()
