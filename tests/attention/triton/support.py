"""Calls that the interpreter finishes in about a second, and their tolerances."""

from tests.attention.cases import Call, check_against_oracle, make_call
from tests.features.cases import Case, by_name

TOLERANCE = 5e-6


def small_call(
    length: int, mode: str = "bidirectional", *, name: str | Case = "positive", **options
) -> Call:
    """One batch row and head, ragged sizes: a head_dim of 24 and 40 features."""
    sizes = {"batch": 1, "heads": 1, "head_dim": 24, "value_dim": 16, "num_features": 40}
    case = by_name(name) if isinstance(name, str) else name
    return make_call(case, length, mode, **{**sizes, **options})


def hostile_call(length: int = 140, mode: str = "causal", **options) -> Call:
    """Entries so large that rows of a chunk underflow at the chunk's scale."""
    sizes = {"head_dim": 16, "value_dim": 8, "num_features": 8, "input_scale": 8.0}
    return small_call(length, mode, **{**sizes, **options})


def check(call: Call, *, tolerance: float = TOLERANCE, gradients: bool = True) -> None:
    """Values and gradients against the oracle in float64."""
    check_against_oracle(
        call,
        "triton",
        value_tolerance=tolerance,
        gradient_tolerance=tolerance,
        gradients=gradients,
    )
