"""Ways to compute the attention of a pretrained head, to be compared with the exact one."""

from dataclasses import dataclass
from typing import get_args

from performers.features.projections import Projection
from performers.features.softmax import Estimator

_ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
_PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
_MAIN: tuple[Estimator, ...] = ("positive", "data_aware")

SDPA = "SDPA"
"""Exact attention as torch computes it; its error is zero."""


@dataclass(frozen=True)
class Variant:
    """One way.

    Attributes:
        estimator: Of the features; None leaves all out that is not exact, without replacement.
        num_features: Features per head; 0 without an estimator.
        projection: Of the features.
        window: Pairs this close are exact; None for no window.
        sinks: First keys that are exact.
        keys: Keys listed by content that are exact, per query.
    """

    estimator: Estimator | None
    num_features: int
    projection: Projection = "orthogonal"
    window: int | None = None
    sinks: int = 0
    keys: int = 0

    @property
    def name(self) -> str:
        """What tables call it, without its number of features."""
        parts = [] if self.estimator is None else [str(self.estimator)]
        if self.projection != "orthogonal":
            parts.append(self.projection)
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.sinks:
            parts.append(f"{self.sinks} sinks")
        if self.keys:
            parts.append(f"{self.keys} keys")
        return ", ".join(parts) + (" alone" if self.estimator is None else "")


@dataclass(frozen=True)
class ExactTerms:
    """The exact terms on offer.

    Attributes:
        window: Of the variants with a window; half of it is tried beside listed keys.
        sinks: With every window.
        keys: Of the variants with listed keys.
    """

    window: int
    sinks: int
    keys: int


def head_variants(
    num_features: int, counts: tuple[int, ...], exact: ExactTerms
) -> tuple[Variant, ...]:
    """What the heads part compares.

    Without exact terms and with a window: every estimator with ``num_features``, and positive and
    data-aware ones with each of ``counts``. With half the window and listed keys: the latter two
    with each of ``counts``; with the whole window and listed keys, and for every projection:
    ``num_features``. And exact terms with nothing besides.

    Args:
        num_features: Features of the comparisons between estimators.
        counts: Numbers of features of the main ones.
        exact: The exact terms.

    Returns:
        The variants, no two the same.
    """
    window, sinks, keys = exact.window, exact.sinks, exact.keys
    near = window // 2
    every = tuple(sorted({num_features, *counts}))
    variants: list[Variant] = []
    for size, first in ((None, 0), (window, sinks)):
        for name in _ESTIMATORS:
            chosen = every if name in _MAIN else (num_features,)
            variants += [Variant(name, m, "orthogonal", size, first) for m in chosen]
    for name in _MAIN:
        variants += [Variant(name, m, "orthogonal", near, sinks, keys) for m in every]
        variants.append(Variant(name, num_features, "orthogonal", window, sinks, keys))
    variants += [
        Variant("data_aware", num_features, projection, window, sinks)
        for projection in _PROJECTIONS
        if projection != "orthogonal"
    ]
    return tuple(dict.fromkeys([*variants, *_without_features(exact)]))


def model_variants(num_features: int, exact: ExactTerms) -> tuple[Variant, ...]:
    """What the model part compares: the main ones, all with the same number of features.

    Args:
        num_features: Features per head.
        exact: The exact terms.

    Returns:
        The variants, no two the same.
    """
    window, sinks, keys = exact.window, exact.sinks, exact.keys
    variants = [
        Variant(name, num_features, "orthogonal", *terms)
        for terms in (
            (None, 0, 0),
            (window, sinks, 0),
            (window // 2, sinks, keys),
            (window, sinks, keys),
        )
        for name in _MAIN
    ]
    return tuple(dict.fromkeys([*variants, *_without_features(exact)]))


def _without_features(exact: ExactTerms) -> list[Variant]:
    """What the exact terms do alone."""
    return [
        Variant(None, 0, "orthogonal", exact.window, exact.sinks),
        Variant(None, 0, "orthogonal", exact.window // 2, exact.sinks, exact.keys),
    ]
