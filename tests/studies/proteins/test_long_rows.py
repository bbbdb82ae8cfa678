"""Long rows: what is measured again and what stands, stops, several processes, real proteins."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from performers.app.errors import UserError
from performers.benchmark.memory import OutOfMemoryError, ProbeError
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences
from performers.training import run as training
from studies.proteins import long_rows, runs
from studies.proteins.long_rows import measure_contexts, measure_cost, run_concatenated
from tests.proteins.runs import SOURCE, finish, launcher, start
from tests.studies.proteins.tiny import PRESET, TRAINING, data


def cost_of(seconds, nbytes, failure=""):
    return {"seconds": seconds, "peak_bytes": nbytes, "failure": failure}


FAILED = cost_of(None, None, "out of memory")
ROTARY = replace(TRAINING, position_embedding="rotary")


@pytest.fixture
def costs(monkeypatch):
    """Costs by attention and length (or layers), to be changed, and what was asked of them."""
    given, asked = {}, []

    def cost(options, row, *, backward):
        key = (options.attention, options.num_layers if backward else len(row))
        asked.append(key)
        return given.get(key, cost_of(1.0, 1000))

    monkeypatch.setattr(long_rows, "measure_cost", cost)
    return given, asked


def contexts(folder):
    measure_contexts(ROTARY, (128, 256), 256, data(), folder, lambda *work: None)
    rows = json.loads((folder / "contexts.json").read_text())["rows"]
    return {(row["attention"], row["length"]): row["failure"] for row in rows}


def test_contexts_that_failed_are_measured_again_and_others_are_not(tmp_path, costs):
    given, asked = costs
    bad = [("exact", 256), ("identity", 128)]
    given.update(dict.fromkeys(bad, FAILED))
    found = contexts(tmp_path)
    assert sorted(asked) == sorted(found), "each once"
    assert [key for key, failure in found.items() if failure] == bad[::-1]
    del given["exact", 256]
    asked.clear()
    found = contexts(tmp_path)
    assert sorted(asked) == bad
    assert [key for key, failure in found.items() if failure] == bad[1:]
    assert len(found) == 8


def concatenated(folder):
    run_concatenated(PRESET.long, data(), folder, lambda *work: None)
    return json.loads((folder / "plan.json").read_text())


def test_a_plan_is_completed_and_what_it_measured_stands(tmp_path, costs):
    given, asked = costs
    given.update({("favor-relu", 2): cost_of(2.0, 1), ("exact", 2): FAILED, ("exact", 1): FAILED})
    plan = concatenated(tmp_path)
    assert asked == [("favor-relu", 2), ("exact", 2), ("exact", 1)]
    assert [entry["options"] is None for entry in plan.values()] == [False, True, True]
    before = (tmp_path / "performer" / "result.json").read_text()
    given.update({("favor-relu", 2): cost_of(9.0, 1), ("exact", 2): cost_of(1.0, 1)})
    asked.clear()
    plan = concatenated(tmp_path)
    assert asked == [("exact", 2)]
    assert plan["performer"]["cost"]["seconds"] == 2.0
    assert plan["transformer"]["options"]["steps"] == 2 * PRESET.long.steps
    assert (tmp_path / "performer" / "result.json").read_text() == before
    assert (tmp_path / "transformer" / "result.json").exists()
    asked.clear()
    assert concatenated(tmp_path) == plan
    assert asked == []


def test_a_plan_stopped_while_it_is_completed_forgets_nothing(tmp_path, costs, monkeypatch):
    given, asked = costs
    given["exact", 2] = FAILED
    concatenated(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(long_rows, "write_json", None)
        with pytest.raises(TypeError):
            concatenated(tmp_path)
    given.clear()
    asked.clear()
    assert not any(entry["cost"]["failure"] for entry in concatenated(tmp_path).values())
    assert asked == [("exact", 2)]
    assert not list(tmp_path.glob("plan-*"))


def test_without_the_performers_time_there_is_advice_and_no_plan(tmp_path, costs):
    given, asked = costs
    given["favor-relu", 2] = cost_of(None, None, "no result after 1800 s")
    with pytest.raises(UserError, match=r"256 tokens .*no result after 1800 s.* --resume"):
        concatenated(tmp_path)
    assert asked == [("favor-relu", 2)], "at once"
    given.clear()
    assert concatenated(tmp_path).keys() == {"performer", "transformer"}


def test_stopped_between_the_model_and_its_result_it_goes_on(tmp_path, costs, monkeypatch):
    write = training.write_result

    def stops(path, content, *arguments, **options):
        if "result" in content:
            raise KeyboardInterrupt
        write(path, content, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(training, "write_result", stops)
        with pytest.raises(KeyboardInterrupt):
            concatenated(tmp_path)
    assert (tmp_path / "performer" / "config.json").exists()
    concatenated(tmp_path)
    assert json.loads((tmp_path / "performer" / "result.json").read_text())["seconds"] > 0


def test_other_processes_wait_for_each_models_scores(tmp_path, costs, monkeypatch):
    concatenated(tmp_path)
    results = sorted(tmp_path.glob("*/result.json"))
    for path in results:
        path.unlink()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) in (2, 4):
            results[len(waits) // 2 - 1].touch()

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(runs.time, "sleep", sleep)
    concatenated(tmp_path)
    assert len(waits) == 4


def test_rows_are_proteins_of_the_study_one_after_another(tmp_path, monkeypatch):
    study = data()
    encoded = encode_sequences(build_protein_tokenizer(), study.train)
    proteins = {tuple(tokens.tolist()) for tokens in encoded}
    total = sum(map(len, encoded))
    row = study.row(total)
    ends = np.flatnonzero(row == encoded[0][-1]) + 1
    assert {tuple(part.tolist()) for part in np.split(row, ends[:-1])} == proteins
    assert study.row(2 * total).tolist() == 2 * row.tolist()
    assert study.row(70).tolist() == row[:70].tolist()
    measured = []

    def cost(options, row, *, backward):
        measured.append(row.tolist())
        return cost_of(1.0, 1)

    monkeypatch.setattr(long_rows, "measure_cost", cost)
    measure_contexts(ROTARY, (128,), 0, study, tmp_path, lambda *work: None)
    assert measured == [row[:128].tolist()] * 3


_TWO = """
import sys
from dataclasses import replace
from pathlib import Path
from studies.proteins import long_rows
from studies.proteins.runs import run_study
from tests.studies.proteins.tiny import PRESET, data

cost = {"seconds": 1.0, "peak_bytes": 1, "failure": ""}
long_rows.measure_cost = lambda *_, **__: cost
small = replace(
    PRESET, seeds=(0,), masked=("exact",), causal=(), kernels=(), context_lengths=(), learnt=0
)
run_study(Path(sys.argv[1]), data(), small, name="tiny")
"""


@pytest.mark.exhaustive
def test_two_processes_make_one_study_and_complete_a_plan(tmp_path):
    script, folder = tmp_path / "two.py", tmp_path / "study"
    script.write_text(_TWO)
    plan = folder / "concatenated" / "plan.json"
    plan.parent.mkdir(parents=True)
    failed = {"options": None, "cost": FAILED}
    plan.write_text(json.dumps({"performer": failed, "transformer": failed}))
    path = os.pathsep.join([str(SOURCE), str(Path(__file__).parents[3])])
    code, _, err = finish(start(*launcher(2), script, folder, PYTHONPATH=path), seconds=300)
    assert code == 0, err
    done = {path.parent.name for path in folder.glob("*/*/result.json")}
    assert done == {"mlm-exact-seed0", "performer", "transformer"}
    records = [json.loads(path.read_text()) for path in folder.glob("*/*/training.json")]
    assert [record["processes"] for record in records] == [2, 2, 2]


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (OutOfMemoryError("killed (out of memory?)"), "killed (out of memory?)"),
        (OutOfMemoryError("RuntimeError: can't allocate memory"), "out of memory"),
        (ProbeError("exit code 1: ValueError: no"), "exit code 1: ValueError: no"),
    ],
)
def test_a_cost_that_cannot_be_measured_says_why(error, failure, monkeypatch):
    asked = []

    def run_apart(task, **options):
        asked.append(task.keywords)
        raise error

    monkeypatch.setattr(long_rows, "run_apart", run_apart)
    row = np.arange(5, 25, dtype=np.int16)
    assert measure_cost(TRAINING, row, backward=True) == cost_of(None, None, failure)
    assert asked[0]["row"] == row.tolist()


@pytest.mark.exhaustive
@pytest.mark.parametrize("backward", [True, False])
def test_a_row_is_measured(backward):
    row = np.arange(5, 25, dtype=np.int16)
    found = measure_cost(TRAINING, row, backward=backward)
    assert found["failure"] == ""
    assert found["seconds"] > 0
