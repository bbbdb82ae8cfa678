"""Settings that `plan` measures, and the arithmetic that they take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from performers.features.projections import PROJECTIONS
from performers.features.softmax import BALANCED, ESTIMATORS, TWO_SIDED
from performers.nn import Approximation
from performers.nn.approximation import NUM_LISTS, as_integer
from performers.planning.samples import Samples

USABLE_ERROR = 0.5
"""Error of the output, relative to its norm, above which a setting is no good; zeros have 1."""
_NAMES = {"estimators": ESTIMATORS, "projections": PROJECTIONS, "heads": ("key", "query")}
_FIELDS = (
    "num_features", "estimator", "projection", "heads", "window", "sinks", "listed_keys",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting(Approximation):
    """An approximation with its measured error and time; NaN before measurement.

    Attributes:
        heads: A projection and a fit for each ``"key"`` head, or for each ``"query"`` head.
        error: Mean of ``|out - exact| / |exact|`` over held-out sequences and draws of the
            projection, Frobenius norms over all heads and positions.
        error_sd: Standard deviation of the same; None after a single measurement.
        head_errors: The same mean for each query head.
        seconds: Time of one call on one sequence of ``Plan.length``, see `measure_times`.
        timed: False where ``seconds`` is an estimate, see `measure_times`.
        ratio: ``seconds`` over those of ``scaled_dot_product_attention`` in the same rounds.
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


def grid(samples: Samples, options: dict[str, Sequence[Any]]) -> list[Setting]:
    """All combinations that ``favor_attention`` accepts, fewest features first.

    Left out are listed keys with trigonometric features, antithetic rows for two-sided estimators,
    and ``heads="query"`` where no key head is shared.

    Args:
        samples: The samples to plan for.
        options: Values of each option, by the names of `plan` in the order of ``_FIELDS``.
    """
    for name, values in options.items():
        _check_values(name, values)
    length, size = samples.query.shape[2], samples.key.shape[2]
    if length != size and any(window is not None for window in options["windows"]):
        raise ValueError(
            f"windows must be (None,) where query and key differ in length, here {length} and "
            f"{size}: a window is a distance within one sequence; got {tuple(options['windows'])}"
        )
    odd = [m for m in options["num_features"] if m % 2]
    if odd and any(name in TWO_SIDED for name in options["estimators"]):
        raise ValueError(f"num_features must be even for {TWO_SIDED}, got {odd[0]}")
    options = {**options, "num_features": sorted(options["num_features"])}
    if samples.query.shape[1] == samples.key.shape[1]:
        options["heads"] = ("key",)
    combinations = (
        dict(zip(_FIELDS, values, strict=True))
        for values in product(*map(dict.fromkeys, options.values()))
    )
    settings = [
        Setting(**x)
        for x in combinations
        if not (x["estimator"] == "trigonometric" and x["listed_keys"])
        and not (x["estimator"] in TWO_SIDED and x["projection"] == "antithetic")
    ]
    if not settings:
        names = "estimators", "projections", "listed_keys"
        raise ValueError(
            "estimators, projections and listed_keys leave no combination that favor_attention "
            f"accepts, got {', '.join(str(tuple(options[name])) for name in names)}"
        )
    return settings


def _check_values(name: str, values: Sequence[Any]) -> None:
    least, optional = int(name == "num_features"), name == "windows"
    expected = f"integers >= {least}{' or None' if optional else ''}"
    if name in _NAMES:
        expected = f"names from {_NAMES[name]}"
    if isinstance(values, (str, int)) or not values:
        raise ValueError(f"{name} must be a sequence of {expected}, got {values!r}")
    for value in values:
        number = as_integer(value)
        valid = (optional and value is None) or (number is not None and number >= least)
        if not (value in _NAMES[name] if name in _NAMES else valid):
            raise ValueError(f"{name} must be a sequence of {expected}, got {value!r}")


def multiply_adds(setting: Setting, samples: Samples) -> float:
    """Multiply-adds per query and query head in the formula of a setting.

    With ``r`` queries for every key that is turned into features (``L H / (S Hkv)``, or ``L / S``
    where key heads are not shared), ``n`` exact keys of window and sinks and ``l`` listed ones:

    * features: ``m (D + Dv + 1) (1 + 1 / r)``, projections (half as many for two-sided
      estimators) and sums;
    * balance of queries and keys (``data_aware``, ``saderf``): ``D^2 (1 + 1 / r)``;
    * window and sinks: ``n (D + Dv)``; ``n`` is the mean over queries;
    * lists: ``l (D + Dv)`` for the exact terms, ``l (m + Dv)`` to subtract their estimates, and
      ``NUM_LISTS D (1 + 1 / r)`` to choose.

    Further work of a backend (chunks of causal sums, blocks) is in the measured time only.
    """
    _, heads, length, head_dim = samples.query.shape
    key_heads, size, value_dim = samples.value.shape[1:]
    shared = heads // key_heads if setting.heads == "key" else 1
    both = 1 + size / (length * shared)
    m = setting.num_features
    rows = m // 2 if setting.estimator in TWO_SIDED else m
    total = (rows * head_dim + m * (value_dim + 1)) * both
    if setting.estimator in BALANCED:
        total += head_dim**2 * both
    exact = 0.0
    if setting.window is not None:
        # The mean number of positions before a query, at most `window`.
        reach = min(setting.window, length - 1)
        before = reach - reach * (reach + 1) / (2 * length)
        exact = 1 + before if samples.is_causal else 1 + 2 * before
    exact = min(exact + setting.sinks, size)
    listed = min(setting.listed_keys, size)
    total += (exact + listed) * (head_dim + value_dim)
    if listed:
        total += listed * (m + value_dim) + NUM_LISTS * head_dim * both
    return total


def exact_multiply_adds(samples: Samples) -> float:
    """``S (D + Dv)``, half of it in causal attention."""
    size, value_dim = samples.value.shape[2:]
    seen = (size + 1) / 2 if samples.is_causal else size
    return seen * (samples.query.shape[3] + value_dim)
