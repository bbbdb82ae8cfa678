"""Calls that the interpreter finishes in about a second, and their tolerances."""

from tests.attention.cases import Call, check_against_oracle, make_call
from tests.features.cases import by_name

TOLERANCE = 5e-6


def small_call(
    length: int, mode: str = "bidirectional", *, name: str = "positive", **options
) -> Call:
    """One batch row and head, ragged sizes: a head_dim of 24 and 40 features."""
    sizes = {"batch": 1, "heads": 1, "head_dim": 24, "value_dim": 16, "num_features": 40}
    return make_call(by_name(name), length, mode, **{**sizes, **options})


def check(call: Call, *, tolerance: float = TOLERANCE, gradients: bool = True) -> None:
    """Values and gradients against the oracle in float64."""
    check_against_oracle(
        call,
        "triton",
        value_tolerance=tolerance,
        gradient_tolerance=tolerance,
        gradients=gradients,
    )
