"""Errors of kernel estimates on random data against the number of features: Figure 4 of the paper.

Measured of each feature map, with the kernel matrix ``A_ij = exp(q_i . k_j)``, its estimate
``K``, the attention matrices ``W = A / rowsum(A)`` and ``V = K / rowsum(K)``, and values ``v``:

* ``kernel_mse``: mean of ``(K_ij - A_ij)^2``.
* ``kernel_relative``: mean of ``(K_ij / A_ij - 1)^2``.
* ``matrix_error``: ``|V - W| / |W|``, Frobenius norms.
* ``output_mse``: mean of ``(V v - W v)^2`` over all elements.
* ``output_error``: ``|V v - W v| / |W v|``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from performers.app.progress import Progress
from performers.benchmark.case import FAILED, MEASURED, Row
from performers.benchmark.measure import Results
from performers.benchmark.timing import threads_of_torch
from performers.features import CALIBRATED, FeatureMap, SoftmaxFeatures
from studies.accuracy.options import KernelOptions

MEASURES = ("kernel_mse", "kernel_relative", "matrix_error", "output_mse", "output_error")
ISOTROPIC, ANISOTROPIC = "isotropic", "anisotropic"
# Queries and keys, apart from those that errors are measured on, that estimators are fitted to.
_CALIBRATION_LENGTH = 1024
# Rows at a time: a block of 4,096 columns stays in the caches of a core, or nearly so.
_BLOCK_ROWS = 256


def make_data(options: KernelOptions) -> dict[str, tuple[int, Tensor]]:
    """The distributions of the study, Gaussian with the scale of the scores in them.

    Returns:
        Name to the number of queries and of keys, and to the standard deviations ``(head_dim,)``
        of their coordinates. ``x' = sqrt(scale) x`` has the norm ``E |x'|^2`` of the options, where
        vectors of N(0, I) and the usual scale have ``sqrt(head_dim)``. The eigenvalues of the
        covariance are all the same, or in proportion to ``1, 1/2, 1/3, ...``.
    """
    isotropic = torch.ones(options.head_dim)
    anisotropic = 1 / torch.arange(1, options.anisotropic_dim + 1)
    return {
        f"{kind} {norm}": (length, (eigenvalues / eigenvalues.sum() * norm).sqrt())
        for kind, length, eigenvalues, norms in (
            (ISOTROPIC, options.kernel_length, isotropic, options.norms),
            (ANISOTROPIC, options.anisotropic_length, anisotropic, options.anisotropic_norms),
        )
        for norm in norms
    }


def sample(width: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Query and key with these standard deviations, and values of N(0, I): ``(length, D)``."""
    shape = (length, len(width))
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    return query * width, key * width, value


@torch.no_grad()
def kernel_errors(
    feature_map: FeatureMap, query: Tensor, key: Tensor, value: Tensor
) -> dict[str, float]:
    """Errors of a feature map on one problem, by the names of ``MEASURES``.

    Memory is that of the features and of a block of 256 rows of the matrices, whatever the number
    of rows. Features are not stabilised: where an exponent passes 88, errors are not finite.
    """
    length, size = query.shape[0], key.shape[0]
    query_features = feature_map(query[None], 1.0, is_query=True)[0]
    key_features = feature_map(key[None], 1.0)[0].mT
    # Fresh memory for every step of every block would cost more than the arithmetic.
    block = min(_BLOCK_ROWS, length)
    buffers = [query.new_empty(block, size) for _ in range(3)]
    totals = torch.zeros(6, dtype=torch.float64, device=query.device)
    for rows, features in zip(query.split(block), query_features.split(block), strict=True):
        exact, estimate, difference = (buffer[: rows.shape[0]] for buffer in buffers)
        torch.mm(rows, key.mT, out=exact).exp_()
        torch.mm(features, key_features, out=estimate)
        kernel = _square(torch.sub(estimate, exact, out=difference))
        relative = _square(torch.div(estimate, exact, out=difference).sub_(1))
        exact /= exact.sum(-1, keepdim=True)
        estimate /= estimate.sum(-1, keepdim=True)
        matrix = _square(torch.sub(estimate, exact, out=difference))
        outputs = _square(difference @ value)
        norms = _square(exact), _square(exact @ value)
        totals += torch.stack((kernel, relative, matrix, outputs, *norms))
    kernel, relative, matrix, outputs, matrix_norm, output_norm = totals
    errors = (
        kernel / (length * size),
        relative / (length * size),
        (matrix / matrix_norm).sqrt(),
        outputs / (length * value.shape[-1]),
        (outputs / output_norm).sqrt(),
    )
    return dict(zip(MEASURES, torch.stack(errors).tolist(), strict=True))


def _square(x: Tensor) -> Tensor:
    """The sum of the squares, float64."""
    flat = x.flatten()
    total = torch.dot(flat, flat).double()
    # Relative errors of trigonometric features can be finite with squares that float32 cannot hold.
    return total if bool(total.isfinite()) else flat.double().square().sum()


def run_kernel(options: KernelOptions, results: Results, progress: Progress) -> None:
    """Measure, group by group, into results that may hold some groups already.

    Every draw has its own data, the same for all estimators, projections and numbers of
    features; estimators that are calibrated are fitted to other data of the same distribution.
    """
    pairs = options.pairs()
    cases = [{"estimator": estimator, "projection": projection} for estimator, projection in pairs]
    groups = [
        (name, *data, count)
        for name, data in make_data(options).items()
        for count in options.kernel_feature_counts
    ]
    total = len(groups) * options.draws
    with threads_of_torch(options.threads):
        for number, (name, length, width, count) in enumerate(groups):
            key: Row = {"data": name, "num_features": count}
            if results.holds(key, cases):
                progress((number + 1) * options.draws, total)
                continue
            draws = []
            for draw in range(options.draws):
                draws.append(_draw(options, length, width, count, draw))
                progress(number * options.draws + draw + 1, total)
            sizes = {"length": length, "head_dim": len(width), "draws": options.draws}
            rows = [
                {**key, **case, **sizes, **_summary([errors[pair] for errors in draws])}
                for pair, case in zip(pairs, cases, strict=True)
            ]
            results.put(key, rows)


def _draw(
    options: KernelOptions, length: int, width: Tensor, count: int, draw: int
) -> dict[tuple[str, str], dict[str, float]]:
    """Errors of all pairs on one draw of data."""
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + draw)
    query, key, value = sample(width, length, generator)
    samples = sample(width, _CALIBRATION_LENGTH, generator)
    fits: dict[str, SoftmaxFeatures] = {}
    errors = {}
    for estimator, projection in options.pairs():
        feature_map = SoftmaxFeatures(
            len(width), count, estimator=estimator, projection=projection, generator=generator
        )
        if estimator in CALIBRATED:
            if estimator not in fits:
                fits[estimator] = feature_map
                feature_map.calibrate_(samples[0][None, None], samples[1][None, None], scale=1.0)
            else:
                feature_map.adopt_calibration_(fits[estimator])
        errors[estimator, projection] = kernel_errors(feature_map, query, key, value)
    return errors


def _summary(draws: Sequence[dict[str, float]]) -> Row:
    """Status, and mean, extremes and median over draws of every measure."""
    row: Row = {"status": MEASURED, "reason": None}
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
