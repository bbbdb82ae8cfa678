"""Error of attention outputs on the heads of a pretrained model, and error against time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from performers.benchmark.accuracy_approximations import (
    SDPA,
    fitted_attention,
    head_approximations,
    setting_columns,
    setting_name,
)
from performers.benchmark.accuracy_passages import Pretrained
from performers.benchmark.checking import (
    CHECKED_LENGTH,
    WrongResultError,
    judge,
    relative_error,
)
from performers.benchmark.groups import FAILED, MEASURED, SKIPPED, Entry, measure_group, verdict
from performers.benchmark.heads import HeadSample, capture_heads
from performers.benchmark.machine import describe
from performers.benchmark.replacement import exact_attention
from performers.benchmark.results import Results, Row, add_ratios, outcome_columns
from performers.benchmark.threads import threads_of_torch
from performers.benchmark.timing import CONTESTANT_ERRORS
from performers.nn import Approximation
from performers.planning.fits import Fits

GROUP_KEYS, MEMBER_KEYS = ("layer",), ("num_features", "setting")
MEAN = "mean"
"""In the column of the layer: the mean of the errors over layers, and the time of a call."""

# Of our backends against the reference one. Long queries and keys cost digits, and normalisers of
# either sign, which can come close to zero, cost more.
_TOLERANCE, _SIGNED_TOLERANCE = 1e-3, 0.1


def heads_results(pretrained: Pretrained) -> Results:
    """The empty results of a run, to be filled by ``run_heads``."""
    settings = pretrained.settings
    threads = settings.threads or torch.get_num_threads()
    return Results("accuracy heads", GROUP_KEYS, MEMBER_KEYS, asdict(settings), describe(threads))


def run_heads(
    pretrained: Pretrained,
    results: Results,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure errors, layer by layer, then times on one layer in turns.

    Results may hold some layers already; times are then taken again.

    Args:
        pretrained: The model, the passages and the settings.
        results: Of ``heads_results``.
        progress: Called with how many layers of how many are done, the times being one more.

    Raises:
        ValueError: The model's attention cannot be captured, or a layer is not there.
    """
    settings, loaded = pretrained.settings, pretrained.loaded
    approximations = head_approximations(pretrained.approximation, settings.feature_counts)
    members = [(x.num_features, setting_name(x)) for x in approximations]
    with threads_of_torch(settings.threads) as threads:
        calibration = capture_heads(loaded, pretrained.calibration)
        layers = pretrained.chosen_layers([sample.layer for sample in calibration])
        fits = {
            sample.layer: Fits(sample, settings.seed + sample.layer)
            for sample in calibration
            if sample.layer in layers
        }
        del calibration
        tests = {x.layer: x for x in capture_heads(loaded, pretrained.test, layers=layers)}
        for number, layer in enumerate(layers):
            if not results.has_group((layer,), members):
                rows = [
                    _layer_row(pretrained, fits[layer], tests[layer], x) for x in approximations
                ]
                results.put_group((layer,), rows)
            progress(number + 1, len(layers) + 1)
        middle = layers[len(layers) // 2]
        rows = _mean_rows(pretrained, results, approximations, fits[middle], tests[middle], threads)
        results.put_group((MEAN,), rows)
        progress(len(layers) + 1, len(layers) + 1)


def pareto_front(points: list[tuple[float, float]]) -> list[bool]:
    """Which points no other beats: as small in both coordinates, and smaller in one.

    Args:
        points: Pairs, such as seconds and error.

    Returns:
        One answer a point.
    """
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def _columns(layer: int | str, approximation: Approximation) -> Row:
    return {"layer": layer, **setting_columns(approximation)}


def _layer_row(
    pretrained: Pretrained, fits: Fits, test: HeadSample, approximation: Approximation
) -> Row:
    """The error of a approximation on one layer, over all passages."""
    row = {**_columns(test.layer, approximation), "status": MEASURED, "reason": None, "error": None}
    backend = pretrained.settings.backend
    try:
        if approximation.num_features:
            _check(fits, test, approximation, backend)
        error = relative_error(
            _run(_attention(fits, approximation, backend), test), _run(exact_attention, test)
        )
        if not math.isfinite(error):
            raise WrongResultError("wrong result: the output is not finite")
        row["error"] = error
    except CONTESTANT_ERRORS as error:
        row["status"], row["reason"] = verdict(error, ours=True)
    return row


def _check(fits: Fits, test: HeadSample, approximation: Approximation, backend: str | None) -> None:
    """Compare the backend with the reference one on a short piece.

    Raises:
        WrongResultError: They differ.
    """
    piece = _beginning(test, CHECKED_LENGTH)
    output, expected = (
        _run(_attention(fits, approximation, name), piece) for name in (backend, "reference")
    )
    tolerance = _SIGNED_TOLERANCE if approximation.estimator == "trigonometric" else _TOLERANCE
    judge("output", output, expected, tuple(expected.shape), tolerance)


def _beginning(sample: HeadSample, length: int) -> HeadSample:
    """The first tokens of the first passage."""
    parts = {
        name: getattr(sample, name)[:1, :, :length].contiguous()
        for name in ("query", "key", "value")
    }
    mask = sample.key_mask
    return replace(sample, **parts, key_mask=None if mask is None else mask[:1, :length])


def _attention(
    fits: Fits, approximation: Approximation, backend: str | None
) -> Callable[..., Tensor]:
    return fitted_attention(fits, approximation, fits.samples.query.shape[1], backend)


@torch.no_grad()
def _run(attention: Callable[..., Tensor], sample: HeadSample) -> Tensor:
    return attention(
        sample.layer,
        sample.query,
        sample.key,
        sample.value,
        scale=sample.scale,
        is_causal=sample.is_causal,
        key_mask=sample.key_mask,
    )


def _mean_rows(
    pretrained: Pretrained,
    results: Results,
    approximations: tuple[Approximation, ...],
    fits: Fits,
    test: HeadSample,
    threads: int,
) -> list[Row]:
    """Mean errors of all approximations, with the times of a call on one passage of one layer."""
    settings = pretrained.settings
    sample = _beginning(test, test.query.shape[2])
    errors = {approximation: _errors(results, approximation) for approximation in approximations}

    def entry(approximation: Approximation) -> Entry:
        stopped = None
        if not approximation.num_features:
            stopped = (SKIPPED, "made of a quadratic mask here, for its error and not its time")
        elif not errors[approximation]:
            stopped = (FAILED, "failed on a layer")
        return Entry(
            _label(approximation),
            lambda: partial(_run, _attention(fits, approximation, settings.backend), sample),
            ours=True,
            stopped=stopped,
        )

    exact = Entry(SDPA, lambda: partial(_run, exact_attention, sample))
    outcomes = measure_group(
        [*(entry(approximation) for approximation in approximations), exact],
        settings,
        threads=threads,
        seed=settings.seed,
    )
    rows: list[Row] = []
    for approximation in approximations:
        found = errors[approximation]
        columns = outcome_columns(outcomes[_label(approximation)])
        if not approximation.num_features and found:
            # Its error is what it is here for.
            columns["status"] = MEASURED
        rows.append(
            {
                **_columns(MEAN, approximation),
                **columns,
                "error": sum(found) / len(found) if found else None,
                "error_low": min(found, default=None),
                "error_high": max(found, default=None),
            }
        )
    rows.append(
        {
            "layer": MEAN,
            "setting": SDPA,
            "num_features": 0,
            **outcome_columns(outcomes[SDPA]),
            **dict.fromkeys(("error", "error_low", "error_high"), 0.0),
        }
    )
    for row in rows:
        del row["peak_bytes"], row["peak_method"]
    add_ratios(rows, "setting", {SDPA: "sdpa_ratio"}, "seconds")
    timed = [row for row in rows if row["seconds"] is not None and row["error"] is not None]
    front = pareto_front([(row["seconds"], row["error"]) for row in timed])
    for row, best in zip(timed, front, strict=True):
        row["front"] = best
    return rows


def _errors(results: Results, approximation: Approximation) -> list[float]:
    """The errors of a approximation on all layers; none if it failed on one."""
    rows = [
        row
        for row in results.rows
        if row["layer"] != MEAN
        and (row["num_features"], row["setting"])
        == (approximation.num_features, setting_name(approximation))
    ]
    errors = [row["error"] for row in rows if row["status"] == MEASURED]
    return errors if len(errors) == len(rows) else []


def _label(approximation: Approximation) -> str:
    return f"{setting_name(approximation)}, {approximation.num_features} features"
