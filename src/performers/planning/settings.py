"""What `plan` can choose from, its cost, and what was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import cast

from performers.features.projections import PROJECTIONS, Projection
from performers.features.softmax import ESTIMATORS, Estimator
from performers.nn import Approximation
from performers.planning.samples import Samples

TWO_SIDED = ("hyperbolic", "trigonometric")
_BALANCED = ("saderf", "data_aware")
HEADS = ("key", "query")


@dataclass(frozen=True, kw_only=True)
class Setting(Approximation):
    """An approximation, and what it was measured to give; NaN before that.

    Attributes:
        heads: A projection and a fit for each ``"key"`` head, or for each ``"query"`` head.
        error: Mean over held-out sequences and draws of the projection of
            ``|out - exact| / |exact|``, Frobenius norms over all heads and positions.
        error_sd: Standard deviation of the same; None where there is one measurement only.
        head_errors: The same mean for each query head on its own.
        seconds: Of one call on one sequence of ``Plan.length``, median of the rounds; see
            `measure_times`.
        timed: False where another setting was clearly faster and no less accurate when errors were
            measured, and ``seconds`` is in proportion to what it took then.
        ratio: ``seconds`` over those of ``scaled_dot_product_attention``, timed in the same
            rounds.
        multiply_adds: Per query and head, see ``multiply_adds``.
    """

    num_features: int
    heads: str = "key"
    error: float = math.nan
    error_sd: float | None = None
    head_errors: tuple[float, ...] = ()
    seconds: float = math.nan
    timed: bool = False
    ratio: float = math.nan
    multiply_adds: float = math.nan

    def label(self) -> str:
        """The setting in words."""
        return super().label() + ("" if self.heads == "key" else f", a fit per {self.heads} head")

    def num_heads(self, samples: Samples) -> int:
        """Number of projections."""
        return (samples.key if self.heads == "key" else samples.query).shape[1]


def grid(
    samples: Samples,
    *,
    num_features: Sequence[int],
    estimators: Sequence[str],
    projections: Sequence[str],
    heads: Sequence[str],
    windows: Sequence[int | None],
    sinks: Sequence[int],
    listed_keys: Sequence[int],
) -> list[Setting]:
    """All combinations that ``favor_attention`` accepts, fewest features first.

    Left out are listed keys with trigonometric features, which cannot be exchanged for exact terms
    one by one, antithetic rows for estimators that have every row's opposite already, and
    ``heads="query"`` where no key head is shared.
    """
    _check_names("estimators", estimators, ESTIMATORS)
    _check_names("projections", projections, PROJECTIONS)
    _check_names("heads", heads, HEADS)
    _check_counts("num_features", num_features, 1)
    _check_counts("windows", windows, 0, none=True)
    _check_counts("sinks", sinks, 0)
    _check_counts("listed_keys", listed_keys, 0)
    length, size = samples.query.shape[2], samples.key.shape[2]
    if length != size and any(window is not None for window in windows):
        raise ValueError(
            f"windows must be (None,) where query and key differ in length, here {length} and "
            f"{size}: a window is a distance within one sequence; got {tuple(windows)}"
        )
    odd = [m for m in num_features if m % 2]
    if odd and any(name in TWO_SIDED for name in estimators):
        raise ValueError(f"num_features must be even for {TWO_SIDED}, got {odd[0]}")
    if samples.query.shape[1] == samples.key.shape[1]:
        heads = ("key",)
    found = [
        Setting(
            num_features=m,
            estimator=cast(Estimator, estimator),
            projection=cast(Projection, projection),
            heads=head,
            window=window,
            sinks=sink,
            listed_keys=listed,
        )
        for m, estimator, projection, head, window, sink, listed in product(
            sorted(set(num_features)),
            dict.fromkeys(estimators),
            dict.fromkeys(projections),
            dict.fromkeys(heads),
            dict.fromkeys(windows),
            dict.fromkeys(sinks),
            dict.fromkeys(listed_keys),
        )
        if not (estimator == "trigonometric" and listed)
        and not (estimator in TWO_SIDED and projection == "antithetic")
    ]
    if not found:
        raise ValueError(
            "estimators, projections and listed_keys leave no combination that favor_attention "
            f"accepts, got {tuple(estimators)}, {tuple(projections)} and {tuple(listed_keys)}"
        )
    return found


def multiply_adds(setting: Setting, samples: Samples, num_lists: int) -> float:
    """Multiply-adds per query and query head that the formula of a setting needs.

    With ``r`` queries for every key that is turned into features (``L H / (S Hkv)``, or ``L / S``
    where key heads are not shared), ``n`` exact keys of window and sinks and ``l`` listed ones:

    * features: ``m (D + Dv + 1) (1 + 1 / r)``, projections (half as many for two-sided
      estimators) and sums;
    * balance of queries and keys (``data_aware``, ``saderf``): ``D^2 (1 + 1 / r)``;
    * window and sinks: ``n (D + Dv)``; ``n`` is the mean over queries;
    * lists: ``l (D + Dv)`` for the exact terms, ``l (m + Dv)`` to take their estimates out, and
      ``num_lists D (1 + 1 / r)`` to choose.

    What a backend does besides (chunks of causal sums, blocks) is in the measured time only.
    """
    _, heads, length, head_dim = samples.query.shape
    key_heads, size, value_dim = samples.value.shape[1:]
    shared = heads // key_heads if setting.heads == "key" else 1
    both = 1 + size / (length * shared)
    m = setting.num_features
    rows = m // 2 if setting.estimator in TWO_SIDED else m
    total = (rows * head_dim + m * (value_dim + 1)) * both
    if setting.estimator in _BALANCED:
        total += head_dim**2 * both
    near = 0.0
    if setting.window is not None:
        behind = _mean_reach(setting.window, length)
        near = 1 + behind if samples.is_causal else 1 + 2 * behind
    near = min(near + setting.sinks, size)
    listed = min(setting.listed_keys, size)
    total += (near + listed) * (head_dim + value_dim)
    if listed:
        total += listed * (m + value_dim) + num_lists * head_dim * both
    return total


def exact_multiply_adds(samples: Samples) -> float:
    """``S (D + Dv)``, half of it in causal attention."""
    size, value_dim = samples.value.shape[2:]
    seen = (size + 1) / 2 if samples.is_causal else size
    return seen * (samples.query.shape[3] + value_dim)


def _mean_reach(window: int, length: int) -> float:
    """Mean over positions of the number of positions before, at most ``window``."""
    reach = min(window, length - 1)
    return reach - reach * (reach + 1) / (2 * length)


def _check_names(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(given, str) or not given or any(entry not in known for entry in given):
        raise ValueError(f"{name} must be a sequence of names from {tuple(known)}, got {given!r}")


def _check_counts(
    name: str, given: Sequence[int | None], least: int, *, none: bool = False
) -> None:
    kind = f"integers >= {least}{' or None' if none else ''}"
    if isinstance(given, (str, int)) or given is None or not given:
        raise ValueError(f"{name} must be a sequence of {kind}, got {given!r}")
    for entry in given:
        if entry is None and none:
            continue
        if not isinstance(entry, int) or isinstance(entry, bool) or entry < least:
            raise ValueError(f"{name} must be a sequence of {kind}, got {entry!r}")
