"""Sequence parallelism over gloo against one process: outputs, gradients, models, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from performers.attention.backends import backends
from tests.distributed.attention_cases import BY_DEFAULT, CALLS
from tests.distributed.model_cases import KINDS, SLOW_KINDS

# Tolerances of models that are saved, padded and trained.
OTHERS = {"saved": 1e-6, "short row": 2e-6, "left padding": 2e-6, "five steps": 1e-5}
# On a machine that others use, too.
_SECONDS = 600


@pytest.fixture(scope="module")
def results(pytestconfig, tmp_path_factory):
    """Results that the processes of each group wrote, by the size of the group and by rank."""
    folder = tmp_path_factory.mktemp("distributed")
    program, part = "tests.distributed.workers", pytestconfig.getoption("markexpr")
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-m", program, str(folder), part],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        errors = process.communicate(timeout=_SECONDS)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors
    found = {}
    for path in sorted(folder.glob("*.json")):
        found.setdefault(int(path.stem[0]), []).append(json.loads(path.read_text()))
    return found


def some(values, by_default):
    """Values, of which all but some are left to ``-m exhaustive``."""
    return [x if x in by_default else mark(x) for x in values]


def mark(x):
    return pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(("direction", "case"), some(CALLS, BY_DEFAULT))
def test_outputs_and_gradients(results, direction, case):
    tolerance = 2 * torch.finfo(torch.bfloat16).eps if case == "bfloat16" else 2e-6
    for rank in results[2]:
        errors = rank["attention"][f"{direction}: {case}"]
        assert set(errors) >= {"out", "query", "key", "value"}
        assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("case", [*(f"backend {x}" for x in backends()), "a dimension of a mesh"])
def test_every_backend_continues_a_causal_row_and_meshes_have_rows(results, case):
    for rank in results[2]:
        assert max(rank["attention"][case].values()) < 2e-6


def test_nan_reaches_the_rows_that_see_it(results):
    for rank in results[2]:
        assert set(rank["attention"]["not finite"].values()) == {0.0}


def test_a_message_is_as_long_for_any_row(results):
    for rank in results[2]:
        sizes = rank["attention"]["message"]
        # Four heads and 32 features: three sums; and seven keys, values and a mask at either edge.
        expected = 4 * (3 * 4 * 32 * (8 + 2) + 2 * 7 * (4 * (8 + 8) + 1))
        assert sizes == {"bytes": expected, "of a longer row": expected}


@pytest.mark.parametrize("case", some((*KINDS, *SLOW_KINDS, *OTHERS), (*KINDS, *OTHERS)))
def test_models(results, case):
    for rank in results[2]:
        errors = rank["models"][case]
        assert max(errors.values()) < OTHERS.get(case, 2e-6), errors


def test_models_that_differ_between_ranks(results):
    for rank in results[2]:
        found = rank["unlike models"]
        assert re.search(r"feature_map\.weight.* must hold the same numbers on all ranks", found)


def test_refusals_on_every_rank(results):
    for rank in results[2]:
        assert len(rank["refusals"]) == 28
        for pattern, message in rank["refusals"]:
            assert re.search(pattern, message), message


@pytest.mark.parametrize("world", some((3, 4), (3,)))
def test_ranks_between_others(results, world):
    for rank in results[world]:
        assert len(rank["attention"]) == {3: 3, 4: 7}[world]
        for errors in rank["attention"].values():
            assert max(errors.values()) < 2e-6, errors
