"""Error of the kernel estimates against the number of features: the paper's Figure 4, and more."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from performers.benchmark.accuracy_data import GaussianData
from performers.benchmark.accuracy_errors import MEASURES, kernel_errors
from performers.benchmark.groups import FAILED, MEASURED
from performers.benchmark.machine import describe
from performers.benchmark.results import Results, Row
from performers.benchmark.settings import KernelSettings
from performers.benchmark.threads import threads_of_torch
from performers.features import CALIBRATED, SoftmaxFeatures
from performers.features.projections import Projection
from performers.features.softmax import Estimator

GROUP_KEYS, MEMBER_KEYS = ("data", "num_features"), ("estimator", "projection")
Pair = tuple[Estimator, Projection]
# Queries and keys, apart from those that errors are measured on, that estimators are fitted to.
_CALIBRATION_LENGTH = 1024


def kernel_results(settings: KernelSettings) -> Results:
    """The empty results of a run, to be filled by ``run_kernel``."""
    threads = settings.threads or torch.get_num_threads()
    return Results("accuracy kernel", GROUP_KEYS, MEMBER_KEYS, asdict(settings), describe(threads))


def run_kernel(
    settings: KernelSettings,
    results: Results,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Measure, group by group, into results that may hold some groups already.

    Every draw has data of its own, the same for all estimators, projections and numbers of
    features; estimators that are calibrated are fitted to other data of the same distribution.

    Args:
        settings: What to measure.
        results: Of ``kernel_results``.
        progress: Called with how many draws of how many are done.
    """
    pairs = settings.pairs()
    groups = [(data, count) for data in settings.data() for count in settings.kernel_feature_counts]
    total = len(groups) * settings.draws
    with threads_of_torch(settings.threads):
        for number, (data, count) in enumerate(groups):
            if results.has_group((data.name, count), pairs):
                progress((number + 1) * settings.draws, total)
                continue
            draws = []
            for draw in range(settings.draws):
                draws.append(_draw(settings, data, count, draw))
                progress(number * settings.draws + draw + 1, total)
            rows = [
                _row(settings, data, count, pair, [errors[pair] for errors in draws])
                for pair in pairs
            ]
            results.put_group((data.name, count), rows)


def _draw(
    settings: KernelSettings, data: GaussianData, count: int, draw: int
) -> dict[Pair, dict[str, float]]:
    """Errors of all pairs on one draw of data."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + draw)
    query, key, value = data.sample(generator)
    samples = data.sample(generator, _CALIBRATION_LENGTH)[:2]
    fits: dict[str, SoftmaxFeatures] = {}
    errors = {}
    for estimator, projection in settings.pairs():
        feature_map = SoftmaxFeatures(
            data.head_dim, count, estimator=estimator, projection=projection, generator=generator
        )
        if estimator in CALIBRATED:
            if estimator not in fits:
                fits[estimator] = feature_map
                query_sample, key_sample = (x[None, None] for x in samples)
                feature_map.calibrate_(query_sample, key_sample, scale=1.0)
            else:
                feature_map.adopt_calibration_(fits[estimator])
        errors[estimator, projection] = kernel_errors(feature_map, query, key, value, 1.0)
    return errors


def _row(
    settings: KernelSettings,
    data: GaussianData,
    count: int,
    pair: Pair,
    draws: Sequence[dict[str, float]],
) -> Row:
    """Mean, extremes and median over draws of every measure."""
    row: Row = {
        "data": data.name,
        "num_features": count,
        "estimator": pair[0],
        "projection": pair[1],
        "length": data.length,
        "head_dim": data.head_dim,
        "draws": settings.draws,
        "status": MEASURED,
        "reason": None,
    }
    for measure in MEASURES:
        values = [errors[measure] for errors in draws]
        summaries: Row = {
            measure: statistics.fmean(values),
            f"{measure}_low": min(values),
            f"{measure}_high": max(values),
            f"{measure}_median": statistics.median(values),
        }
        if not math.isfinite(sum(values)):
            row |= {"status": FAILED, "reason": f"{measure} is not finite"}
            summaries = dict.fromkeys(summaries)
        row |= summaries
    return row
