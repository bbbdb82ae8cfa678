"""Costs: measured in another process, on the row that is given, and why there is none."""

import json
import signal
import subprocess

import numpy as np
import pytest

from studies.proteins import cost
from studies.proteins.cost import measure_cost
from tests.studies.proteins.tiny import TRAINING

ROW = np.arange(5, 25, dtype=np.int16)


@pytest.fixture
def answers(monkeypatch):
    """Makes the other process end with a code and a message; what it was given is listed."""
    given = []

    def answer(code, err="", out=""):
        def run(command, **options):
            given.append(json.loads(options["input"]))
            return subprocess.CompletedProcess(command, code, out, err)

        monkeypatch.setattr(cost.subprocess, "run", run)
        return given

    return answer


@pytest.mark.parametrize(
    ("code", "err", "failure"),
    [
        (-signal.SIGKILL, "", "killed (out of memory?)"),
        (1, "RuntimeError: can't allocate memory", "out of memory"),
        (1, "ValueError: no", "exit code 1: ValueError: no"),
    ],
)
def test_a_failure_says_why(answers, code, err, failure):
    answers(code, err)
    assert measure_cost(TRAINING, ROW, backward=True) == cost.Cost(None, None, failure)


def test_the_row_is_the_one_given(answers):
    given = answers(0, out='{"seconds": 1.0, "peak_bytes": 2}\n')
    assert measure_cost(TRAINING, ROW, backward=False) == cost.Cost(1.0, 2)
    assert given[0]["row"] == ROW.tolist()


@pytest.mark.exhaustive
@pytest.mark.parametrize("backward", [True, False])
def test_a_row_is_measured(backward):
    found = measure_cost(TRAINING, ROW, backward=backward, repeats=1, threads=1)
    assert found.failure == ""
    assert found.seconds > 0
