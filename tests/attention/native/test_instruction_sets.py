"""Everything that depends on the instruction set, on each that this machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from performers.attention.native import library
from tests.attention.native.support import NATIVE, REASON

pytestmark = [NATIVE, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
OTHERS = () if REASON else tuple(x for x in library.available_isas() if x != library.isa())
# What these test is the same whatever the kernels are compiled for.
ELSEWHERE = (
    "test_compile.py",
    "test_memory.py",
    "native/test_instruction_sets.py",
    "native/test_library.py",
    "native/test_operators.py",
)
# What each kernel computes, and its gradients; the rest of the battery asks the same in more
# layouts, and tools/sanitize runs it on each instruction set.
CORE = ("test_values.py", "test_nonfinite.py")


def run_battery(isa, paths, least, chosen="native"):
    """In a process of its own: the choice is made once, when the library is loaded."""
    command = [sys.executable, "-m", "pytest", "-k", chosen, "-q", "-x"]
    command += [f"tests/attention/{path}" for path in paths]
    command += ["-p", "no:cacheprovider", "--no-header"]
    command += [f"--ignore=tests/attention/{name}" for name in ELSEWHERE]
    environment = os.environ | {
        "PERFORMERS_NATIVE_ISA": isa,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(library.__file__).parents[3]), str(ROOT)]),
    }
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    passed = int(result.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1])
    assert passed > least


@pytest.mark.parametrize("isa", OTHERS)
def test_the_core_of_the_battery(isa):
    run_battery(isa, CORE, 100, "native and not more_than_one_block and not states")


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_the_whole_battery(isa):
    run_battery(isa, ("",), 2000)
