"""The floor under a time: the same number of operations as matrix products that stay in cache.

The rate is the best of torch's own product and, where the compiled kernels are, of the products of
linear attention alone as they multiply them: no input read, no exponential taken.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from performers.attention.native import library
from performers.attention.native.interface import Call
from performers.benchmark.timing import finished

_SECONDS_A_SHAPE = 0.1

# (rows, inner, columns) of one product; the blocks of linear attention are given to all threads as
# a batch, a few to each, and the larger squares are shared among the threads. All fit in L2 or L3.
_BLOCKS = ((64, 64, 256), (256, 64, 256), (256, 256, 64))
_BLOCKS_A_THREAD = 4
_SQUARES = (256, 512, 768)
_LARGE_SQUARES = (2048, 4096, 8192)

# Sizes of the products that the kernels are asked for: a few blocks of 64 positions to each thread.
_LENGTH, _HEAD_DIM, _FEATURES = 512, 64, 256
_HEADS_A_THREAD = 4
NATIVE = "products of the native kernels"


class Floor(NamedTuple):
    """The best rate of a matrix product, in operations a second, and the rates of all shapes."""

    flops_per_second: float
    rates: dict[str, float]


def measure_floor(
    dtype: torch.dtype,
    threads: int,
    device: str = "cpu",
    *,
    seconds: float = _SECONDS_A_SHAPE,
) -> Floor:
    """Measure products on operands that stay in cache, on a GPU large square ones.

    Each rate is the best of many calls: a floor is what the machine can do.
    """
    rates = {
        name: _best_rate(call, operations, seconds)
        for name, operations, call in _products(dtype, threads, device)
    }
    return Floor(max(rates.values()), rates)


def _products(
    dtype: torch.dtype, threads: int, device: str
) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Name, operations and call of each product."""
    for size in _SQUARES if device == "cpu" else _LARGE_SQUARES:
        left, right, out = torch.randn(3, size, size, device=device).to(dtype)
        call = finished(partial(torch.mm, left, right, out=out), device)
        yield f"{size} x {size} x {size}", 2 * size**3, call
    if device != "cpu":
        return
    batch = _BLOCKS_A_THREAD * threads
    for rows, inner, columns in _BLOCKS:
        left = torch.randn(batch, rows, inner).to(dtype)
        right = torch.randn(batch, inner, columns).to(dtype)
        out = torch.empty(batch, rows, columns, dtype=dtype)
        name = f"{batch} x ({rows} x {inner} x {columns})"
        operations = 2 * batch * rows * inner * columns
        yield name, operations, partial(torch.bmm, left, right, out=out)
    if dtype == torch.float32 and library.unavailable_reason() is None:
        heads = _HEADS_A_THREAD * threads
        kernels = Call.sized(
            heads=heads,
            length=_LENGTH,
            head_dim=_HEAD_DIM,
            value_dim=_HEAD_DIM,
            features=_FEATURES,
        )
        yield NATIVE, 8 * heads * _LENGTH * _HEAD_DIM * _FEATURES, partial(kernels.run, "products")


def _best_rate(function: Callable[[], object], operations: int, seconds: float) -> float:
    function()
    best, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        function()
        best = min(best, time.perf_counter() - start)
    return operations / best
