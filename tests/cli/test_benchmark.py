"""The benchmark commands: what they write and print, and what they refuse."""

import json
import re

import pytest

from tests.benchmark.runs import break_backend, quick_floor, read_csv
from tests.cli.commands import refusal, run

COMMANDS = ["attention", "model", "decode"]
QUICK = ["--repeats", 2, "--min-time", 0]
SHAPE = ["--heads", 2, "--head-dim", 8, "--num-features", 16]
ATTENTION = [
    "benchmark", "attention", *QUICK, *SHAPE, "--no-memory", "--lengths", "16,32",
    "--contestants", "performers torch,SDPA,identity", "--directions", "causal",
]  # fmt: skip
MODEL = ["benchmark", "model", *QUICK, "--no-memory", "--size", "small", "--lengths", "16"]
DECODE = ["benchmark", "decode", *QUICK, *SHAPE, "--contexts", "8,16", "--tokens", 2]
FILES = ["benchmark.png", "benchmark.svg", "results.csv", "results.json"]


@pytest.fixture(autouse=True)
def wide_terminal_and_quick_floor(monkeypatch):
    monkeypatch.setattr("performers.benchmark.cases.attention.measure_floor", quick_floor)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("performers.cli.benchmark.output.width", 200)


@pytest.mark.parametrize(
    ("arguments", "rows", "words"),
    [
        (ATTENTION, 12, ["causal, forward", "causal, forward+backward", "GFLOP/s", "SDPA"]),
        (MODEL, 4, ["small model, clm", "identity", "favor-relu"]),
        (DECODE, None, ["layer", "exact KV cache", "state"]),
    ],
    ids=COMMANDS,
)
def test_files_and_tables(arguments, rows, words, tmp_path):
    out, lines = run(*arguments, "--output", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    flat = read_csv((tmp_path / "out" / "results.csv").read_text())
    assert len(content["rows"]) == len(flat) > 0
    assert rows is None or len(flat) == rows
    assert [float(row["seconds"]) for row in flat] == [row["seconds"] for row in content["rows"]]
    assert content["benchmark"] == arguments[1]
    assert all(word in out for word in words)
    assert "results.json" in out
    assert any(re.match(rf"benchmark {arguments[1]}: \d+ of \d+", line) for line in lines)


def test_memory_is_measured_up_to_a_length(tmp_path):
    out, _ = run(
        "benchmark", "attention", *QUICK, *SHAPE, "--lengths", "16,32", "--directions", "causal",
        "--contestants", "identity", "--passes", "forward", "--memory-max-length", 16,
        "--output", tmp_path / "out",
    )  # fmt: skip
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows[0]["peak_bytes"] >= 0
    assert rows[0]["peak_method"] in ("VmHWM", "ru_maxrss")
    assert rows[1]["peak_bytes"] is None
    assert "memory" in out


def test_what_is_absent_is_said(tmp_path):
    arguments = [*ATTENTION[:-4], "--contestants", "SDPA,fla", "--output", tmp_path / "out"]
    _, lines = run(*arguments)
    assert lines[0].startswith("fla: ")


def test_a_wrong_backend_ends_with_code_1_and_the_rest_is_written(tmp_path, monkeypatch):
    def attend(right, problem):
        out, state = right(problem)
        return out * 2, state

    break_backend(monkeypatch, "torch", attend)
    out, lines = run(*ATTENTION, "--output", tmp_path / "out", code=1)
    assert "failed: performers torch; wrong result: output differs" in lines[-1]
    assert "failed: wrong result" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


def test_a_folder_with_results_needs_resume(tmp_path):
    run(*DECODE, "--output", tmp_path)
    before = (tmp_path / "results.json").read_text()
    assert "--resume to continue" in refusal(*DECODE, "--output", tmp_path)
    run(*DECODE, "--output", tmp_path, "--resume")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows == json.loads(before)["rows"]
    _, lines = run(*DECODE, "--seed", 5, "--output", tmp_path, "--resume", code=2)
    assert "measured with seed 0, this is 5; give another folder" in lines[-1]


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch):
    from performers.benchmark import measure as module

    measure, calls = module.measure_group, []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **more)

    monkeypatch.setattr(module, "measure_group", interrupted)
    _, lines = run(*ATTENTION, "--output", tmp_path, code=130)
    assert "6 rows are in" in lines[-1]
    assert len(read_csv((tmp_path / "results.csv").read_text())) == 6
    monkeypatch.undo()
    _, lines = run(*ATTENTION, "--output", tmp_path, "--resume")
    assert lines[0].startswith("6 rows kept")
    assert len(read_csv((tmp_path / "results.csv").read_text())) == 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attention", "--lengths", "a,b"], "--lengths must be whole numbers"),
        (["attention", "--lengths", "64,32"], "--lengths must be positive and rise"),
        (["attention", "--head-dim", "0"], "--head-dim must be at least 1, got 0"),
        (["attention", "--contestants", "flash"], "--contestants must be one of performers"),
        (["model", "--size", "huge"], "--size must be one of regular, small; got 'huge'"),
        (["decode", "--contexts", ""], "--contexts must be whole numbers"),
    ],
)
def test_bad_options_name_their_flag(arguments, words, tmp_path):
    assert words in refusal("benchmark", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
