"""Error of the kernel estimates against the number of features: the paper's Figure 4, and more."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch

from performers.benchmark.accuracy_data import GaussianData
from performers.benchmark.accuracy_errors import MEASURES, kernel_errors
from performers.benchmark.groups import FAILED, MEASURED
from performers.benchmark.machine import describe
from performers.benchmark.results import Results, Row
from performers.benchmark.threads import threads_of_torch
from performers.benchmark.workload import at_least, rising, subset_of
from performers.features import CALIBRATED, ESTIMATORS, PROJECTIONS, SoftmaxFeatures
from performers.features.projections import Projection
from performers.features.softmax import Estimator

GROUP_KEYS, MEMBER_KEYS = ("data", "num_features"), ("estimator", "projection")
ISOTROPIC, ANISOTROPIC = "isotropic", "anisotropic"
Pair = tuple[Estimator, Projection]
_TWO_SIDED = ("hyperbolic", "trigonometric")
# Queries and keys, apart from those that errors are measured on, that estimators are fitted to.
_CALIBRATION_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """What the kernel part of ``performers benchmark accuracy`` measures.

    Attributes:
        kernel_length: Queries and keys of the isotropic data.
        head_dim: Length of its vectors.
        norms: ``E |x'|^2`` of its queries and keys, scale included, rising.
        anisotropic_length: Queries and keys of the anisotropic data.
        anisotropic_dim: Length of its vectors.
        anisotropic_norms: ``E |x'|^2`` of its queries and keys, rising.
        kernel_feature_counts: Numbers of features, even and rising.
        estimators: Of ``ESTIMATORS``.
        projections: Of ``PROJECTIONS``.
        draws: Of data and projection together.
        threads: Threads of torch; its own choice when None.
        seed: Of the draws.
    """

    kernel_length: int = 4096
    head_dim: int = 16
    norms: tuple[int, ...] = (1, 4)
    anisotropic_length: int = 1024
    anisotropic_dim: int = 64
    anisotropic_norms: tuple[int, ...] = (2, 4, 8)
    kernel_feature_counts: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    estimators: tuple[str, ...] = ESTIMATORS
    projections: tuple[str, ...] = PROJECTIONS
    draws: int = 15
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: An option is out of range or unknown; the message names it.
        """
        for name in ("kernel_length", "anisotropic_length"):
            at_least(name, getattr(self, name), 2)
        for name in ("head_dim", "anisotropic_dim", "draws"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if self.threads is not None:
            at_least("threads", self.threads, 1)
        rising("norms", self.norms)
        rising("anisotropic_norms", self.anisotropic_norms)
        rising("kernel_feature_counts", self.kernel_feature_counts)
        if any(count % 2 for count in self.kernel_feature_counts):
            raise ValueError(
                "kernel_feature_counts must be even, as the two-sided estimators take features in "
                f"pairs, got {list(self.kernel_feature_counts)}"
            )
        subset_of("estimators", self.estimators, ESTIMATORS)
        subset_of("projections", self.projections, PROJECTIONS)
        if not self.pairs():
            raise ValueError(
                f"projections must have one besides antithetic for {', '.join(self.estimators)}, "
                "which have opposite rows already"
            )

    def data(self) -> list[GaussianData]:
        """The distributions."""
        kinds = (
            (ISOTROPIC, self.norms, self.kernel_length, self.head_dim),
            (ANISOTROPIC, self.anisotropic_norms, self.anisotropic_length, self.anisotropic_dim),
        )
        return [
            GaussianData(f"{kind} {norm}", length, head_dim, norm, kind == ISOTROPIC)
            for kind, norms, length, head_dim in kinds
            for norm in norms
        ]

    def pairs(self) -> list[Pair]:
        """Estimators with projections, all that exist."""
        return [
            (cast(Estimator, estimator), cast(Projection, projection))
            for estimator in self.estimators
            for projection in self.projections
            if not (estimator in _TWO_SIDED and projection == "antithetic")
        ]


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
