"""Every kernel compiled for GPUs that are not there: no spills, tensor cores in hot loops.

In a process of its own, since these are compiled and the others interpreted.
"""

import json
import os
import subprocess
import sys

import pytest
import triton

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="the table of block sizes is for Triton 3.7"
)
SHARED = {80: 163 * 1024, 90: 227 * 1024}
# Kernels whose time is in products of matrices.
HOT = {
    "key_sums",
    "read_rows",
    "query_sums",
    "query_gradients",
    "key_gradients",
    "chunk_rows",
    "chunk_query_gradients",
    "chunk_key_gradients",
    "exact_rows",
    "exact_query_gradients",
    "exact_key_gradients",
}


def compile_all(head_dim, dtype, *options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    module = "tests.attention.triton.compiling"
    command = [sys.executable, "-m", module, str(head_dim), dtype, *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def check(rows, stack=0, *, warpgroups=True, complete=True):
    if complete:
        assert {row["kernel"] for row in rows} >= HOT | {"decode_step", "mend_rows"}
    for row in rows:
        assert row["shared"] <= SHARED[row["capability"]], row
        assert row["stack"] <= stack, row
        if row["kernel"] in HOT:
            wanted = "warpgroup" if warpgroups and row["capability"] == 90 else "matrix"
            assert row[wanted] > 0, row


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_head_dim_64():
    """Part of what CI runs."""
    check(compile_all(64, "bfloat16"))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype):
    """Blocks of float32 have 32 rows, fewer than instructions of a warpgroup take."""
    check(compile_all(64, dtype), warpgroups=dtype != "float32")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_other_functions():
    """Calls without windows, whose kernels are not among these."""
    check(compile_all(64, "bfloat16", "--fn", "relu"), complete=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_head_dim_128(dtype):
    """Some spill, but not by much."""
    check(compile_all(128, dtype), stack=512)
