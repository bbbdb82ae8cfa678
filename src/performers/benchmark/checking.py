"""The gate before the stopwatch: what computes the wrong thing is not timed."""

from collections.abc import Callable

import torch
from torch import Tensor

from performers.benchmark.calls import AttentionCall
from performers.benchmark.contestants import Contestant, favor
from performers.benchmark.workload import Workload

CHECKED_LENGTH = 200
"""Tokens of the comparison: several blocks of every backend, the last one cut short."""

# Of the norm of the difference over the norm of the reference. Half precision rounds inputs of the
# reference too, so what remains is the rounding of outputs and gradients.
TOLERANCES = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}

_PARTS = ("output", "gradient of query", "gradient of key", "gradient of value")


class WrongResultError(RuntimeError):
    """A contestant does not compute what it should; the message says what differs."""


def check(contestant: Contestant, workload: Workload, is_causal: bool, backward: bool) -> None:
    """Run a contestant on a short sequence and judge what it returns.

    One of our backends must agree with ``backend="reference"``. Others compute something else, so
    theirs must have the right shape and be finite.

    Args:
        contestant: Who.
        workload: On what.
        is_causal: Whether attention is causal.
        backward: Whether gradients are judged as well.

    Raises:
        WrongResultError: It is wrong.
    """
    inputs = workload.inputs(CHECKED_LENGTH, requires_grad=backward)
    results = AttentionCall(contestant.build(workload, is_causal), inputs, backward=backward)()
    expected: tuple[Tensor | None, ...] = (None,) * len(results)
    if contestant.backend is not None:
        oracle = favor("reference")(workload, is_causal)
        expected = AttentionCall(oracle, inputs, backward=backward)()
    for part, result, right in zip(_PARTS, results, expected, strict=False):
        if result is not None:
            judge(part, result, right, tuple(inputs.value.shape), TOLERANCES[workload.dtype])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|``, Frobenius norms in float64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def first_checked(call: Callable[[], tuple[Tensor | None, ...]]) -> Callable[[], None]:
    """A call that refuses results that are not finite, the first time, which is not timed.

    Raises:
        WrongResultError: When called, if they are not.
    """
    checked = False

    def run() -> None:
        nonlocal checked
        results = call()
        if not checked:
            for part, result in zip(_PARTS, results, strict=False):
                if result is not None:
                    judge(part, result, None, tuple(result.shape), 0.0)
            checked = True

    return run


def judge(
    part: str,
    actual: Tensor,
    expected: Tensor | None,
    shape: tuple[int, ...],
    tolerance: float,
) -> None:
    """Judge one tensor.

    Args:
        part: What it is, for the message.
        actual: The tensor.
        expected: What it should be, or None when that is not known.
        shape: The shape it should have.
        tolerance: The largest relative error.

    Raises:
        WrongResultError: Its shape, a value that is not finite, or the error.
    """
    if actual.shape != torch.Size(shape):
        raise WrongResultError(
            f"wrong result: {part} has shape {tuple(actual.shape)}, expected {tuple(shape)}"
        )
    if not bool(actual.isfinite().all()):
        raise WrongResultError(f"wrong result: {part} holds values that are not finite")
    if expected is None:
        return
    error = relative_error(actual, expected)
    if not error <= tolerance:
        raise WrongResultError(
            f"wrong result: {part} differs from the reference by {error:.2g} of its norm, "
            f"{tolerance:.2g} is allowed"
        )
