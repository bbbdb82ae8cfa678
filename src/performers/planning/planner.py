"""`plan`: measure what ``favor_attention`` offers on sample queries and keys, and choose."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from performers.attention import backends
from performers.features import SoftmaxFeatures
from performers.nn.approximation import as_integer
from performers.planning.diagnosis import Diagnosis, diagnose
from performers.planning.exact import exact_attention
from performers.planning.fits import Fits
from performers.planning.measuring import Progress, measure_errors, measure_times
from performers.planning.samples import Samples, checked_samples
from performers.planning.settings import (
    USABLE_ERROR,
    Setting,
    exact_multiply_adds,
    grid,
    multiply_adds,
)
from performers.planning.table import plan_text

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Measured settings, the recommended one, and the diagnosis of the samples.

    Attributes:
        settings: All that were measured, in the order of the grid.
        front: The Pareto front, error against seconds, fastest first.
        recommended: The recommended setting.
        met: Whether it meets the targets; True without any.
        reason: The reason in words.
        diagnosis: Statistics of the sample queries and keys.
        exact_seconds: Time of ``scaled_dot_product_attention`` in the same rounds.
        exact_multiply_adds: Of exact attention, per query and head.
        length: Positions of the sequence that was timed.
        sample_shape: Batch, heads, key heads, length and head_dim of the samples.
        held_out: Sequences that errors were measured on, and positions of each.
        samples: All samples, to calibrate on.

    Further attributes are arguments of `plan`.
    """

    settings: tuple[Setting, ...]
    front: tuple[Setting, ...]
    recommended: Setting
    met: bool
    reason: str
    diagnosis: Diagnosis
    exact_seconds: float
    exact_multiply_adds: float
    length: int
    sample_shape: tuple[int, ...]
    held_out: tuple[int, int]
    target_error: float | None
    target_time: float | None
    seed: int
    backend: str | None
    samples: Samples = field(repr=False, compare=False)

    @property
    def is_usable(self) -> bool:
        """True if the recommended setting's error is at most 0.5, half of the output's norm."""
        return self.recommended.error <= USABLE_ERROR

    def build(self, setting: Setting | None = None) -> tuple[SoftmaxFeatures, dict[str, Any]]:
        """A feature map calibrated on all samples, and options for ``favor_attention``.

        Args:
            setting: One of ``settings``; the recommended one when None.

        Returns:
            The feature map, and keyword arguments ``is_causal``, ``scale``, ``window``, ``sinks``,
            ``listed_keys`` and ``backend``. A ``key_mask`` belongs to a call and is not among them.

        Raises:
            ValueError: ``setting`` is of another type.
        """
        chosen = self.recommended if setting is None else setting
        if not isinstance(chosen, Setting):
            raise ValueError(
                f"setting must be one of plan.settings or None, got {type(chosen).__name__}"
            )
        fits = Fits(self.samples, self.seed)
        favor = fits.attention(chosen, chosen.num_heads(self.samples))
        assert isinstance(favor.feature_map, SoftmaxFeatures)
        return favor.feature_map, {
            "is_causal": self.samples.is_causal,
            "scale": self.samples.scale,
            "window": chosen.window,
            "sinks": chosen.sinks,
            "listed_keys": favor.buckets,
            "backend": self.backend,
        }

    def table(self) -> str:
        """The plan as text, with a row for every setting, fastest first."""
        return plan_text(self, every=True)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, in the types of JSON."""
        names = [x.name for x in fields(self) if x.name != "samples"]
        text = json.dumps({name: getattr(self, name) for name in names}, default=asdict)
        return dict(json.loads(text))

    def __str__(self) -> str:
        return plan_text(self)


@torch.no_grad()
def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    target_error: float | None = None,
    target_time: float | None = None,
    length: int | None = None,
    num_features: Sequence[int] = (64, 128, 256, 512),
    estimators: Sequence[str] = ("positive", "data_aware"),
    projections: Sequence[str] = ("orthogonal",),
    heads: Sequence[str] = ("key",),
    windows: Sequence[int | None] = (None, 32, 64, 128),
    sinks: Sequence[int] = (0, 4),
    listed_keys: Sequence[int] = (0, 64),
    num_draws: int = 2,
    seed: int = 0,
    backend: str | None = None,
    show: bool = True,
) -> Plan:
    """Measure error and time of ways to call ``favor_attention`` on samples, and recommend one.

    Half of the rows (rounded up) calibrate, and errors are measured on the others: they are those
    of unseen sequences of the same kind. A single row is cut in two sequences of half its length,
    which tells less: pass two rows or more. The error of a sequence is ``|out - exact| / |exact|``
    with ``exact`` softmax attention and Frobenius norms over heads and positions (without padding,
    where there are as many queries as keys).

    A recommended setting with an error above 0.5 is called no good, in the text and by
    ``Plan.is_usable``: half of the output is then error.

    Every combination of the options is measured, on ``num_draws`` projections. The default grid
    takes some tens of seconds on two cores for 12 heads and 512 positions, and more in proportion
    to both.

    Args:
        query: Sample queries, shape ``(B, H, L, D)``, as for ``favor_attention``.
        key: Sample keys, shape ``(B, Hkv, S, D)``.
        value: Sample values, shape ``(B, Hkv, S, Dv)``. When None, standard normal ones: the
            error is then that of the attention matrix, ``|A' - A| / |A|``, up to chance.
        is_causal: As in ``favor_attention``.
        key_mask: As in ``favor_attention``.
        scale: As in ``favor_attention``.
        target_error: Recommend the fastest setting with an error of at most this.
        target_time: Recommend the most accurate setting that takes at most this, in seconds for
            one sequence of ``length``. With both, the fastest that meets both.
        length: Positions of the sequence that is timed, the first held-out one, cut or repeated;
            that of the samples when None. Errors are measured at the samples' length.
        num_features: Values of ``m``.
        estimators: Of ``SoftmaxFeatures``.
        projections: Of ``SoftmaxFeatures``.
        heads: A projection and a fit for each ``"key"`` head or each ``"query"`` head; where key
            heads are shared, the latter is more accurate and takes longer.
        windows: Exact windows; None for none.
        sinks: Numbers of first keys that are exact.
        listed_keys: Numbers of keys that ``ListedKeys`` lists for a query; 0 for none.
        num_draws: Draws of the projection.
        seed: Random seed.
        backend: As in ``favor_attention``.
        show: Print the plan, and progress on stderr where that is a terminal.

    Returns:
        The plan. ``features, options = plan.build()`` makes the recommended feature map,
        calibrated on all rows, and the options to call ``favor_attention`` with.

    Raises:
        ValueError: An argument does not fit; the message names it.

    Example:
        >>> import torch, performers
        >>> query, key, value = (torch.randn(2, 1, 20, 8) for _ in range(3))
        >>> plan = performers.plan(query, key, value, num_features=(16,), show=False)
        >>> features, options = plan.build()
        >>> performers.favor_attention(query, key, value, features, **options).shape
        torch.Size([2, 1, 20, 8])
    """
    for name, target in (("target_error", target_error), ("target_time", target_time)):
        if target is not None and not (
            isinstance(target, (int, float)) and math.isfinite(target) and target > 0
        ):
            raise ValueError(f"{name} must be a positive number or None, got {target!r}")
    for name, count, least in (
        ("length", 1 if length is None else length, 1),
        ("num_draws", num_draws, 1),
        ("seed", seed, 0),
    ):
        number = as_integer(count)
        if number is None or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")
    if backend is not None and backend not in backends():
        raise ValueError(f"backend must be one of {backends()} here, or None, got {backend!r}")
    samples = checked_samples(
        query, key, value, is_causal=is_causal, key_mask=key_mask, scale=scale, seed=seed
    )
    options: dict[str, Sequence[Any]] = {
        "num_features": num_features,
        "estimators": estimators,
        "projections": projections,
        "heads": heads,
        "windows": windows,
        "sinks": sinks,
        "listed_keys": listed_keys,
    }
    settings = grid(samples, options)
    progress = Progress(show)
    calibration, held_out = samples.split()
    fits = Fits(calibration, seed)
    diagnosis = diagnose(
        held_out, fits, most_features=max(num_features), windows=windows, sinks=sinks, seed=seed
    )
    dtype = torch.promote_types(query.dtype, torch.float32)
    exact = exact_attention(
        *(x.to(dtype) for x in (held_out.query, held_out.key, held_out.value)), **held_out.options
    )
    measured: list[Setting] = []
    for setting in settings:
        measured.append(measure_errors(setting, held_out, exact, fits, num_draws, backend))
        progress.write(f"plan: errors {len(measured)}/{len(settings)}")
    sequence = held_out.at_length(samples.query.shape[2] if length is None else length)
    measured, exact_seconds = measure_times(measured, sequence, fits, backend, progress, seed)
    progress.write("", end="\r")
    measured = [replace(x, multiply_adds=multiply_adds(x, sequence)) for x in measured]
    front = pareto_front(
        [setting for setting in measured if setting.timed], lambda x: (x.seconds, x.error)
    )
    recommended, met, reason = choose(front, target_error, target_time)
    result = Plan(
        settings=tuple(measured),
        front=tuple(front),
        recommended=recommended,
        met=met,
        reason=reason,
        diagnosis=diagnosis,
        exact_seconds=exact_seconds,
        exact_multiply_adds=exact_multiply_adds(sequence),
        length=sequence.query.shape[2],
        sample_shape=(*query.shape[:2], *key.shape[1:2], *query.shape[2:]),
        held_out=(held_out.query.shape[0], held_out.query.shape[2]),
        target_error=target_error,
        target_time=target_time,
        seed=int(seed),
        backend=backend,
        samples=samples,
    )
    if show:
        print(result)
    return result


def pareto_front(items: Sequence[T], costs: Callable[[T], tuple[float, float]]) -> list[T]:
    """Items that no other one equals in both costs and betters in one, by the first cost."""
    front: list[T] = []
    for item in sorted(items, key=costs):
        if not front or costs(item)[1] < costs(front[-1])[1]:
            front.append(item)
    return front


def choose(
    front: Sequence[Setting], target_error: float | None, target_time: float | None
) -> tuple[Setting, bool, str]:
    """Choose a setting of the front; also whether it meets the targets, and the reason.

    * With ``target_error``, the fastest that meets it; with ``target_time`` as well, within that.
    * With ``target_time`` alone, the most accurate within it.
    * Without either, the one with the least ``error^2 * seconds``, the inverse efficiency of a
      Monte Carlo method: more features lower the squared error at best in proportion to time.
    * Where nothing meets ``target_error``, the most accurate (within ``target_time``, if anything
      is); where nothing is as fast as ``target_time``, the fastest. Neither counts as met.
    """
    if target_error is None and target_time is None:
        knee = min(front, key=lambda setting: setting.error**2 * setting.seconds)
        return knee, True, "the least error^2 x time"
    in_time = [s for s in front if target_time is None or s.seconds <= target_time]
    limit = "" if target_time is None else f" within {1e3 * target_time:.4g} ms"
    if not in_time:
        return front[0], False, f"NOTHING is{limit}: the fastest"
    if target_error is None:
        return in_time[-1], True, f"the most accurate{limit}"
    for setting in in_time:
        if setting.error <= target_error:
            reason = f"the fastest with an error of at most {target_error:.4g}{limit}"
            return setting, True, reason
    reason = f"NOTHING reaches an error of {target_error:.4g}{limit}: the most accurate"
    return in_time[-1], False, reason
