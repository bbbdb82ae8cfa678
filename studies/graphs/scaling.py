"""Time and peak memory of one attention against the number of nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from performers.benchmark.memory import peak_of, run_apart
from performers.benchmark.timing import interleave
from studies.graphs.models import (
    EDGES,
    EXACT,
    OURS,
    PYG,
    WIDTH,
    gps_layer,
    neighbours_of,
    set_neighbours,
)
from studies.parts import Part

CONTESTANTS = (EXACT, PYG, OURS, EDGES)
DEGREE = 9
"""Mean number of neighbours, about that of Debian's packages."""


def measure_scaling(nodes: int, *, exact: bool) -> Part:
    """Times in turns in this process, and peak memory in another one.

    Returns:
        ``seconds`` (medians) and ``nbytes`` by attention, of a forward and a backward pass.
    """
    names = [name for name in CONTESTANTS if exact or name != EXACT]
    calls = {name: training_step(name, nodes) for name in names}
    timings, errors = interleave(calls, repeats=3, min_time=0.0)
    if errors:
        raise RuntimeError(f"failed with {nodes:,} nodes: {errors}")
    nbytes = run_apart(partial(peak_memory, names=names, nodes=nodes), threads=1)
    return {"seconds": {name: x.median for name, x in timings.items()}, "nbytes": nbytes}


def peak_memory(names: list[str], nodes: int) -> dict[str, int]:
    """Bytes of a forward and a backward pass above what was there before, by attention."""
    found = {}
    for name in names:
        # Libraries load with the first call.
        training_step(name, 64)()
        found[name] = peak_of(training_step(name, nodes)).nbytes
    return found


def training_step(name: str, nodes: int) -> Callable[[], None]:
    """A forward and a backward pass of an attention as ``GPSConv`` calls it, on a random graph."""
    torch.manual_seed(0)
    layer = gps_layer(name, None)
    x = torch.randn(1, nodes, WIDTH, requires_grad=True)
    mask = torch.ones(1, nodes, dtype=torch.bool)
    edges = torch.randint(nodes, (2, nodes * DEGREE // 2))
    set_neighbours(layer, neighbours_of(torch.cat([edges, edges.flip(0)], dim=1), nodes))

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        if name == EXACT:
            out, _ = layer.attn(x, x, x, key_padding_mask=~mask, need_weights=False)
        else:
            out = layer.attn(x, mask=mask)
        out.sum().backward()

    return step
