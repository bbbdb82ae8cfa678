"""`plan`: measure what ``favor_attention`` offers on real queries and keys, and choose."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from performers.attention import backends
from performers.planning.diagnosis import diagnose
from performers.planning.exact import exact_attention
from performers.planning.fits import NUM_LISTS, Fits
from performers.planning.measuring import Errors, measure_errors, measure_times
from performers.planning.progress import Progress
from performers.planning.result import Plan
from performers.planning.samples import checked_samples
from performers.planning.selection import choose, pareto_front
from performers.planning.settings import Setting, exact_multiply_adds, grid, multiply_adds


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

    Half of the rows (rounded up) calibrate, and errors are measured on the others, so that the
    error of a setting is what sequences of the same kind that nobody has seen will have. A single
    row is cut in two sequences of half its length, which is worth less: give two rows or more.
    The error of a sequence is ``|out - exact| / |exact|`` with ``exact`` softmax attention and
    Frobenius norms over heads and positions (not those that ``key_mask`` hides, where there are as
    many queries as keys).

    Every combination of the sequences of options is measured, on ``num_draws`` projections.
    ``Setting.multiply_adds`` counts its arithmetic, and `measure_times` says how it is timed. The
    default grid takes some tens of seconds on two cores for 12 heads and 512 positions, and more in
    proportion to both.

    Args:
        query: Sample queries, shape ``(B, H, L, D)``, as ``favor_attention`` gets them.
        key: Sample keys, shape ``(B, Hkv, S, D)``.
        value: Sample values, shape ``(B, Hkv, S, Dv)``. When None, standard normal ones: the
            error is then that of the attention matrix, ``|A' - A| / |A|``, up to chance.
        is_causal: As in ``favor_attention``.
        key_mask: As in ``favor_attention``.
        scale: As in ``favor_attention``.
        target_error: Recommend the fastest setting with an error of at most this.
        target_time: Recommend the most accurate setting that takes at most this, in seconds for
            one sequence of ``length``. With both, the fastest that meets both.
        length: Positions of the sequence that is timed, the first one held out, cut or repeated;
            that of the samples when None. Errors are those at the samples' own length.
        num_features: Values of ``m``.
        estimators: Of ``SoftmaxFeatures``.
        projections: Of ``SoftmaxFeatures``.
        heads: A projection and a fit for each ``"key"`` head or each ``"query"`` head; where key
            heads are shared, the latter is more accurate and takes longer.
        windows: Exact windows; None for none.
        sinks: Numbers of first keys that are exact.
        listed_keys: Numbers of keys that ``ListedKeys`` list for a query; 0 for none.
        num_draws: Draws of the projection.
        seed: Of draws, pairs and orders.
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
        >>> found = performers.plan(query, key, value, num_features=(16,), show=False)
        >>> features, options = found.build()
        >>> performers.favor_attention(query, key, value, features, **options).shape
        torch.Size([2, 1, 20, 8])
    """
    _check_numbers(target_error, target_time, length, num_draws, seed, backend)
    samples = checked_samples(
        query, key, value, is_causal=is_causal, key_mask=key_mask, scale=scale, seed=seed
    )
    settings = grid(
        samples,
        num_features=num_features,
        estimators=estimators,
        projections=projections,
        heads=heads,
        windows=windows,
        sinks=sinks,
        listed_keys=listed_keys,
    )
    progress = Progress(show)
    calibration, held_out = samples.split()
    fits = Fits(calibration, seed)
    found = diagnose(
        held_out,
        fits,
        most_features=max(num_features),
        windows=windows,
        sinks=sinks,
        seed=seed,
    )
    exact = exact_attention(held_out)
    errors = []
    progress.start("errors", len(settings))
    for setting in settings:
        errors.append(measure_errors(setting, held_out, exact, fits, num_draws, backend))
        progress.step()
    sequence = held_out.at_length(samples.query.shape[2] if length is None else length)
    times, exact_seconds = measure_times(settings, errors, sequence, fits, backend, progress, seed)
    progress.finish()
    measured = tuple(
        _measured(setting, error, *time, exact_seconds, multiply_adds(setting, sequence, NUM_LISTS))
        for setting, error, time in zip(settings, errors, times, strict=True)
    )
    front = pareto_front([setting for setting in measured if setting.timed])
    choice = choose(front, target_error, target_time)
    result = Plan(
        settings=measured,
        front=tuple(front),
        recommended=choice.setting,
        met=choice.met,
        reason=choice.reason,
        diagnosis=found,
        exact_seconds=exact_seconds,
        exact_multiply_adds=exact_multiply_adds(sequence),
        length=sequence.query.shape[2],
        sample_shape=(*query.shape[:2], *key.shape[1:2], *query.shape[2:]),
        held_out=(held_out.query.shape[0], held_out.query.shape[2]),
        target_error=target_error,
        target_time=target_time,
        seed=seed,
        backend=backend,
        samples=samples,
    )
    if show:
        print(result)
    return result


def _measured(
    setting: Setting, errors: Errors, seconds: float, timed: bool, exact_seconds: float, adds: float
) -> Setting:
    total = errors.total
    return replace(
        setting,
        error=errors.mean,
        error_sd=float(total.std()) if len(total) > 1 else None,
        head_errors=tuple(errors.heads.mean(0).tolist()),
        seconds=seconds,
        timed=timed,
        ratio=seconds / exact_seconds,
        multiply_adds=adds,
    )


def _check_numbers(
    target_error: float | None,
    target_time: float | None,
    length: int | None,
    num_draws: int,
    seed: int,
    backend: str | None,
) -> None:
    for name, target in (("target_error", target_error), ("target_time", target_time)):
        if target is not None and not (
            isinstance(target, (int, float)) and math.isfinite(target) and target > 0
        ):
            raise ValueError(f"{name} must be a positive number or None, got {target!r}")
    for name, count, least in (
        ("length", length, 1),
        ("num_draws", num_draws, 1),
        ("seed", seed, 0),
    ):
        if (count is None and name == "length") or (
            isinstance(count, int) and not isinstance(count, bool) and count >= least
        ):
            continue
        raise ValueError(f"{name} must be an integer of at least {least}, got {count!r}")
    if backend is not None and backend not in backends():
        raise ValueError(f"backend must be one of {backends()} here, or None, got {backend!r}")
