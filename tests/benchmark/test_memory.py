"""Peak memory: of this process, of a process of its own, and the limit."""

import subprocess
from functools import partial

import psutil
import pytest
import torch

from performers.benchmark import memory
from performers.benchmark.cases.attention import measure_peak
from performers.benchmark.memory import (
    OutOfMemoryError,
    ProbeError,
    is_out_of_memory,
    limited_memory,
    peak_of,
    run_apart,
)
from performers.benchmark.settings import Workload

MIB = 2**20


def probe(**changes):
    arguments = {
        "workload": Workload(),
        "contestant": "identity",
        "length": 16384,
        "is_causal": False,
        "backward": False,
    }
    return partial(measure_peak, **(arguments | changes))


linux = pytest.mark.skipif(not memory._STATUS.exists(), reason="needs /proc")


@linux
def test_the_peak_counts_what_was_freed_again():
    # Freed at the end of the expression, so that only the peak knows of it.
    peak = peak_of(lambda: float(torch.ones(16 * MIB).sum()))
    assert peak.method == "VmHWM"
    # Linux counts pages in batches.
    assert 63 * MIB <= peak.nbytes < 80 * MIB


@linux
def test_the_peak_is_not_that_of_an_earlier_call():
    peak_of(lambda: float(torch.ones(32 * MIB).sum()))
    assert peak_of(lambda: float(torch.ones(4 * MIB).sum())).nbytes < 32 * MIB


def test_a_system_that_cannot_reset_the_peak(monkeypatch):
    monkeypatch.setattr(memory, "_reset_peak", lambda: False)
    highest = iter([100, 300])
    monkeypatch.setattr(memory, "_highest", lambda: next(highest))
    assert peak_of(lambda: None) == (200, "ru_maxrss")


@linux
def test_a_probe_sees_the_output_of_the_call_and_nothing_else():
    output = 8 * 16384 * 64 * 4
    assert 0.9 * output <= run_apart(probe(), threads=1).nbytes < 1.2 * output


@pytest.mark.parametrize(
    ("code", "err", "kind", "words"),
    [
        (-9, "", OutOfMemoryError, r"killed \(out of memory\?\)"),
        (1, "RuntimeError: can't allocate memory", OutOfMemoryError, "allocate memory"),
        (1, "a\nKeyError: 'nobody'", ProbeError, "exit code 1: KeyError: 'nobody'"),
    ],
)
def test_a_failing_process_says_why(monkeypatch, code, err, kind, words):
    done = subprocess.CompletedProcess([], code, "", err)
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(kind, match=words):
        run_apart(probe(), threads=1)


@pytest.mark.exhaustive
@linux
def test_a_probe_that_needs_more_than_there_is():
    total = psutil.virtual_memory().total
    length = 2 * total // (8 * 64 * 4)
    with pytest.raises(OutOfMemoryError, match="allocate"):
        run_apart(probe(length=length), threads=1)


@linux
def test_allocations_beyond_the_limit_raise_and_the_limit_goes(monkeypatch):
    monkeypatch.setattr(memory, "_available_bytes", lambda: 256 * MIB)
    with limited_memory(), pytest.raises(RuntimeError) as caught:
        torch.ones(128 * MIB)
    assert is_out_of_memory(caught.value)
    assert torch.ones(128 * MIB).nbytes == 512 * MIB


def test_errors_that_are_not_about_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory("std::bad_alloc")
