"""Time and memory of attention against length."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from performers.benchmark.case import Benchmark, Case, Column, Group, Ratio, Row
from performers.benchmark.cases.contestants import (
    PERFORMER_PYTORCH,
    SDPA,
    Attention,
    Contestant,
    contestants,
    favor,
    pass_flops,
)
from performers.benchmark.cases.floor import measure_floor
from performers.benchmark.cases.inputs import Inputs, dtype_of, make_inputs
from performers.benchmark.gate import (
    CHECKED_LENGTH,
    TOLERANCES,
    Gate,
    check_shape,
    first_checked,
    judge,
)
from performers.benchmark.memory import Peak, peak_of
from performers.benchmark.settings import PASSES, AttentionSettings, Workload
from performers.benchmark.table import digits, nbytes, percent, seconds, times
from performers.benchmark.timing import finished

MATMULS = "matmuls alone"
"""The row of the products around every call, with ``between_matmuls``."""

_PARTS = ("output", "gradient of query", "gradient of key", "gradient of value")
# Loads libraries and starts threads, whose memory is not that of the call.
_WARM_UP_LENGTH = 64
_GROUP = ("direction", "passes", "length")


def run_attention(
    attend: Attention,
    inputs: Inputs,
    *,
    backward: bool,
    between: Callable[[], object] = lambda: None,
) -> tuple[Tensor | None, ...]:
    """Run attention forward, or forward and backward on inputs that require gradients.

    Args:
        attend: The attention.
        inputs: Its inputs.
        backward: Whether gradients of query, key and value are computed.
        between: Called before, after and between the passes, as other layers of a model would be.

    Returns:
        The output, and the gradients where asked for (None for what has no influence).
    """
    query, key, value, grad = inputs
    between()
    with torch.set_grad_enabled(backward):
        out = attend(query, key, value)
    between()
    if not backward:
        return (out,)
    # Not backward(): it would add to gradients kept from call to call.
    gradients = torch.autograd.grad(out, (query, key, value), grad, allow_unused=True)
    between()
    return (out.detach(), *gradients)


def make_matmul(workload: Workload, length: int) -> Callable[[], Tensor]:
    """The product of a model's hidden states with a square matrix, into preallocated memory.

    Two thread pools that wait by spinning slow each other down, which no call alone shows. Products
    on torch's pool between the calls make it visible.
    """
    hidden = workload.heads * workload.head_dim
    generator = torch.Generator().manual_seed(workload.seed)
    states = torch.randn(workload.batch * length, hidden, generator=generator)
    states = states.to(workload.device, dtype_of(workload))
    weight = torch.randn(hidden, hidden, generator=generator)
    weight = weight.to(workload.device, dtype_of(workload))
    return partial(torch.mm, states, weight, out=torch.empty_like(states))


def check(contestant: Contestant, workload: Workload, is_causal: bool, backward: bool) -> None:
    """Run a contestant on a short sequence and judge its results.

    A backend of this package must agree with ``backend="reference"``. Other libraries compute
    something else: their results must have the right shape and be finite.

    Raises:
        WrongResultError: A result is wrong.
    """
    inputs = make_inputs(workload, CHECKED_LENGTH, requires_grad=backward)
    results = run_attention(contestant.build(workload, is_causal), inputs, backward=backward)
    expected: tuple[Tensor | None, ...] = (None,) * len(results)
    if contestant.backend is not None:
        oracle = favor("reference", workload, is_causal)
        expected = run_attention(oracle, inputs, backward=backward)
    for name, result, right in zip(_PARTS, results, expected, strict=False):
        if result is not None and right is not None:
            judge(name, result, right, TOLERANCES[workload.dtype])
        elif result is not None:
            check_shape(name, result, inputs.value)


def measure_peak(
    workload: Workload, contestant: str, length: int, is_causal: bool, backward: bool
) -> Peak:
    """Peak memory of one call; runs in a separate process."""
    attend = contestants(workload.device)[contestant].build(workload, is_causal)

    def call(length: int) -> Callable[[], object]:
        inputs = make_inputs(workload, length, requires_grad=backward)
        return partial(run_attention, attend, inputs, backward=backward)

    call(_WARM_UP_LENGTH)()
    return peak_of(call(length), torch.device(workload.device))


def _absences(settings: AttentionSettings) -> dict[str, str]:
    known = contestants(settings.device)
    names = settings.contestants or tuple(known)
    return {name: reason for name in names if (reason := known[name].absence)}


def _groups(settings: AttentionSettings, notes: dict[str, Any]) -> list[Group]:
    known = contestants(settings.device)
    chosen = [known[name] for name in settings.contestants or known if not known[name].absence]
    backward = PASSES[1] in settings.passes
    floor = measure_floor(dtype_of(settings), torch.get_num_threads(), settings.device)
    notes["floor"] = floor._asdict()
    groups = []
    for direction in settings.directions:
        is_causal = direction == "causal"
        # One for all lengths and passes.
        gates = [(one, Gate(partial(check, one, settings, is_causal, backward))) for one in chosen]
        groups += [
            _group(settings, direction, passes, length, gates, floor.flops_per_second)
            for length in settings.lengths
            for passes in settings.passes
        ]
    return groups


def _group(
    settings: AttentionSettings,
    direction: str,
    passes: str,
    length: int,
    gates: list[tuple[Contestant, Gate]],
    flops_per_second: float,
) -> Group:
    is_causal, backward = direction == "causal", passes == PASSES[1]
    inputs = cache(lambda: make_inputs(settings, length, requires_grad=backward))
    matmul = cache(lambda: make_matmul(settings, length))

    def prepare(contestant: Contestant) -> Callable[[], object]:
        attend = contestant.build(settings, is_causal)
        between = {"between": matmul()} if settings.between_matmuls else {}
        call = partial(run_attention, attend, inputs(), backward=backward, **between)
        return finished(first_checked(call, _PARTS), settings.device)

    def prepare_matmuls() -> Callable[[], object]:
        product, products = matmul(), 3 if backward else 2

        def call() -> None:
            for _ in range(products):
                product()

        return finished(call, settings.device)

    flops = {one.name: one.flops for one, _ in gates}

    def finish(rows: list[Row]) -> None:
        if settings.between_matmuls:
            alone = next(row for row in rows if row["contestant"] == MATMULS)["seconds"]
            for row in rows:
                _subtract(row, 0.0 if row["contestant"] == MATMULS else alone)
        for row in rows:
            row |= dict.fromkeys(("flops", "gflops_per_second", "floor_seconds", "floor_share"))
            count = flops.get(row["contestant"])
            if count is None:
                continue
            row["flops"] = pass_flops(count(settings, length, is_causal), passes)
            row["floor_seconds"] = row["flops"] / flops_per_second
            if row["seconds"] is not None and row["seconds"] > 0:
                row["gflops_per_second"] = row["flops"] / row["seconds"] / 1e9
                row["floor_share"] = row["floor_seconds"] / row["seconds"]

    cases = [
        Case(
            {"contestant": one.name},
            partial(prepare, one),
            gate=gate,
            probe=partial(measure_peak, settings, one.name, length, is_causal, backward),
            ours=one.backend is not None,
            skip=settings.skip_exact(length) if one.growth > 1 else None,
            growth=one.growth,
        )
        for one, gate in gates
    ]
    if settings.between_matmuls:
        cases.append(Case({"contestant": MATMULS}, prepare_matmuls))
    return Group({"direction": direction, "passes": passes, "length": length}, cases, finish)


def _subtract(row: Row, seconds: float | None) -> None:
    """Subtract the time of the products around a call; ``whole_seconds`` keeps the sum."""
    row["whole_seconds"] = row["seconds"]
    for column in ("seconds", "first_quartile", "third_quartile", "fastest"):
        if row[column] is not None and seconds is not None:
            row[column] -= seconds


ATTENTION = Benchmark(
    name="attention",
    titles=("direction", "passes"),
    title="{direction}, {passes}",
    across="length",
    series="contestant",
    columns=(
        Column("median", "seconds", seconds),
        Column("SDPA\n/ this", "sdpa_ratio", times),
        Column("p.-pytorch\n/ this", "performer_pytorch_ratio", times),
        Column("GFLOP/s", "gflops_per_second", digits),
        Column("of\nfloor", "floor_share", percent),
        Column("peak\nmemory", "peak_bytes", nbytes),
    ),
    plotted=(("seconds", "seconds"), ("peak_bytes", "peak memory")),
    ratios=(
        Ratio("sdpa_ratio", lambda row: row["contestant"] == SDPA, _GROUP),
        Ratio(
            "performer_pytorch_ratio", lambda row: row["contestant"] == PERFORMER_PYTORCH, _GROUP
        ),
    ),
    groups=_groups,
    absences=_absences,
)
