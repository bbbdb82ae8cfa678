"""Forked children, and whose threads the kernels run on."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from performers.attention.native import library
from tests.attention.cases import POSITIVE, make_call, with_gradients
from tests.attention.native.support import NATIVE, threads

FORKS = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = [NATIVE, pytest.mark.timeout(120)]

MODES = ("bidirectional", "causal")


def call_of(mode):
    return make_call(POSITIVE, 600, mode, heads=4, num_features=20)


def child(connection):
    torch.set_num_threads(1)
    connection.send([[x.numpy() for x in with_gradients(call_of(m), "native")] for m in MODES])
    connection.close()


@FORKS
def test_a_forked_child_with_one_thread():
    """After the parent has used its pool, which does not exist in the child."""
    with threads(4):
        expected = [with_gradients(call_of(mode), "native") for mode in MODES]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        assert ours.poll(60), "the child does not answer"
        for results, wanted in zip(ours.recv(), expected, strict=True):
            assert all((a == b.numpy()).all() for a, b in zip(results, wanted, strict=True))
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
    # The parent's pool still works.
    with threads(4):
        assert all(map(torch.equal, with_gradients(call_of("causal"), "native"), expected[1]))


@LINUX
def test_tasks_run_on_the_threads_of_torch():
    function = library.load()["performers_parallelism"]
    function.restype = ctypes.c_char_p
    if not torch.backends.openmp.is_available():
        pytest.skip("this torch was built without OpenMP")
    assert function() == b"openmp"


OPENMP = """
import re
import torch

def runtimes():
    maps = open("/proc/self/maps").read()
    return sorted(set(re.findall(r"\\S*lib(?:gomp|iomp|omp)\\S*", maps)))

def count():
    return len(__import__("os").listdir("/proc/self/task"))

torch.set_num_threads(3)
x = torch.randn(512, 512)
for _ in range(3):
    x.exp(); x @ x
before, started = runtimes(), count()
import performers
features = performers.SoftmaxFeatures(16, 64)
inputs = [torch.randn(3, 4, 700, 16, requires_grad=True) for _ in range(3)]
for is_causal in (False, True):
    out = performers.favor_attention(*inputs, features, is_causal=is_causal, backend="native")
    out.sum().backward()
    x.exp(); x @ x
from performers.attention.native import library
assert library.load()._name in open("/proc/self/maps").read()
assert runtimes() == before, (before, runtimes())
print(len(before), count() - started)
"""


@pytest.mark.exhaustive
@LINUX
def test_no_second_openmp_runtime_and_no_second_pool():
    """Two runtimes' threads would spin against each other after every call.

    One thread more is that of autograd.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(library.__file__).parents[3])}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [sys.executable, "-c", OPENMP], env=environment, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    found, started = map(int, result.stdout.split())
    assert found <= 1
    assert started <= 1
