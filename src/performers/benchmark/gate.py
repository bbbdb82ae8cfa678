"""Checks results before they are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor

from performers.planning.exact import relative_error

CHECKED_LENGTH = 200
"""Tokens of a comparison: several blocks of every backend, the last one incomplete."""

# Half precision rounds inputs of the reference too, so what remains is the rounding of outputs and
# gradients.
TOLERANCES = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest relative errors."""

# What a case may raise without ending the run. Allocation failures of torch are RuntimeError.
CASE_ERRORS = (RuntimeError, MemoryError, TypeError, ValueError, ArithmeticError)


class WrongResultError(RuntimeError):
    """A result differs from the expected one."""


class Gate:
    """A check that runs once, before the first measurement of any of its cases.

    It raises one of ``CASE_ERRORS`` where a contestant is wrong.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    @cached_property
    def error(self) -> Exception | None:
        """The error of the check, None when it passed."""
        try:
            self._check()
        except CASE_ERRORS as error:
            return error
        return None


def judge(part: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare a tensor with the expected one; ``part`` is its name in the message.

    Raises:
        WrongResultError: The shape differs, a value is not finite, or the relative error exceeds
            ``tolerance``.
    """
    check_shape(part, actual, expected)
    error = float(relative_error(actual, expected))
    if not error <= tolerance:
        raise WrongResultError(
            f"wrong result: {part} differs from the reference by {error:.2g} of its norm, "
            f"{tolerance:.2g} is allowed"
        )


def check_shape(part: str, actual: Tensor, expected: Tensor) -> None:
    """Check that a tensor has another's shape, and finite values.

    Raises:
        WrongResultError: The shape differs, or a value is not finite.
    """
    if actual.shape != expected.shape:
        raise WrongResultError(
            f"wrong result: {part} has shape {tuple(actual.shape)}, expected "
            f"{tuple(expected.shape)}"
        )
    check_finite(part, actual)


def check_finite(part: str, actual: Tensor) -> None:
    """Check that all values are finite.

    Raises:
        WrongResultError: A value is not finite.
    """
    if not bool(actual.isfinite().all()):
        raise WrongResultError(f"wrong result: {part} holds values that are not finite")


def first_checked(
    call: Callable[[], Sequence[Tensor | None]], parts: Sequence[str]
) -> Callable[[], None]:
    """A call that checks, the first time only, that its results are finite."""
    checked = False

    def run() -> None:
        nonlocal checked
        results = call()
        if not checked:
            for part, result in zip(parts, results, strict=False):
                if result is not None:
                    check_finite(part, result)
            checked = True

    return run
