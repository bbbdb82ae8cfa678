"""Chi-squared of samplers on a real catalogue: dependencies of Debian packages.

The task is to name a dependency of a package from its others. ``χ²(p‖q) + 1`` is the factor by
which importance sampling from ``q`` needs more draws than from the softmax ``p`` itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from performers import SoftmaxFeatures
from performers.catalogue import CatalogueSampler
from performers.features.softmax import Estimator
from studies.catalogue.negatives import FixedLoss
from studies.debian import named_packages, package_fields
from studies.parts import Part
from studies.training import descend

_DIM = 32
_LEAST = 3

LogQ = Callable[[Tensor], Tensor]
"""Logarithms of the probabilities of all items ``(Q, n)`` for queries ``(Q, d)``."""


def read_dependencies(index: str) -> tuple[list[list[int]], int]:
    """Dependencies of the packages that have three or more, and the number of different ones."""
    packages = package_fields(index)
    every = (
        [x for x in dict.fromkeys(named_packages(fields)) if x in packages and x != package]
        for package, fields in packages.items()
    )
    rows = [row for row in every if len(row) >= _LEAST]
    numbers = {name: i for i, name in enumerate(sorted({name for row in rows for name in row}))}
    return [[numbers[name] for name in row] for row in rows], len(numbers)


def _batch(rows: list[list[int]], source: random.Random, context: Tensor) -> tuple[Tensor, Tensor]:
    """Unit queries, the mean of the other dependencies, and the dependency left out."""
    left_out = [source.randrange(len(row)) for row in rows]
    others = [row[:i] + row[i + 1 :] for row, i in zip(rows, left_out, strict=True)]
    offsets = torch.tensor([0, *map(len, others[:-1])]).cumsum(0)
    flat = torch.tensor([item for row in others for item in row])
    query = F.embedding_bag(flat, context, offsets, mode="mean")
    target = torch.tensor([row[i] for row, i in zip(rows, left_out, strict=True)])
    return F.normalize(query, dim=-1), target


def train(
    rows: list[list[int]], count: int, steps: int, source: random.Random
) -> tuple[Tensor, Tensor, float]:
    """Embeddings of contexts and of items (unit rows), and the inverse temperature."""
    context = torch.nn.Parameter(0.1 * torch.randn(count, _DIM))
    items = torch.nn.Parameter(0.1 * torch.randn(count, _DIM))
    scale = torch.nn.Parameter(torch.tensor(10.0))
    optimizer = torch.optim.Adam([context, items, scale], 3e-3)
    loss_of = FixedLoss(popularity(rows, count), 2000, shared=True)
    for _ in range(steps):
        query, target = _batch(source.sample(rows, min(256, len(rows))), source, context)
        descend(loss_of(scale * query, F.normalize(items, dim=-1), target), optimizer)
    return context.detach(), F.normalize(items.detach(), dim=-1), scale.item()


def popularity(rows: list[list[int]], count: int) -> Tensor:
    """Number of occurrences of each item, and a tenth."""
    return torch.tensor([item for row in rows for item in row]).bincount(minlength=count) + 0.1


def _fixed(weight: Tensor) -> LogQ:
    log_q = (weight / weight.sum()).log()
    return lambda query: log_q.expand(len(query), -1)


def inverted_index(items: Tensor, scale: float, generator: torch.Generator) -> LogQ:
    """A cluster of √n means by the softmax over means, an item in it uniformly."""
    count = len(items)
    centres = items[torch.randperm(count, generator=generator)[: round(math.sqrt(count))]]
    for _ in range(8):
        nearest = (items @ centres.T).argmax(1)
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, nearest, items), dim=-1)
    nearest = (items @ centres.T).argmax(1)
    sizes = nearest.bincount(minlength=len(centres))
    log_size = sizes.log()

    def log_q(query: Tensor) -> Tensor:
        share = (scale * query @ centres.T + log_size).log_softmax(-1)
        return (share - sizes.clamp_min(1).log())[:, nearest]

    return log_q


def feature_sampler(
    items: Tensor, scale: float, estimator: Estimator, num_features: int, generator: torch.Generator
) -> LogQ:
    """RF-softmax: the kernel ``exp(scale x·e)`` estimated by random features, where positive.

    A twentieth is uniform, as in `CatalogueSampler`: estimates that are not positive would have no
    probability.
    """
    features = SoftmaxFeatures(_DIM, num_features, estimator=estimator, generator=generator)

    def log_q(query: Tensor) -> Tensor:
        kernel = features.estimate_kernel(query[None, None], items[None, None], scale=scale)[0, 0]
        kernel = kernel.double().clamp_min(0)
        share = kernel / kernel.sum(1, keepdim=True).clamp_min(1e-300)
        return (0.95 * share + 0.05 / len(items)).log()

    return log_q


def two_level_sampler(
    items: Tensor, scale: float, num_blocks: int | None, generator: torch.Generator
) -> LogQ:
    """`CatalogueSampler`, with as many blocks as it chooses or as given."""
    sampler = CatalogueSampler(items, scale=scale, num_blocks=num_blocks, generator=generator)
    every = torch.arange(len(items))
    return lambda query: sampler.log_prob(query, every.expand(len(query), -1))


def chi_squared(query: Tensor, items: Tensor, scale: float, log_q: LogQ) -> Tensor:
    """``χ²(p‖q)`` of each query."""
    parts = []
    for part in query.split(200):
        log_p = (scale * part @ items.T).log_softmax(-1).double()
        parts.append((2 * log_p - log_q(part).double()).exp().sum(1) - 1)
    return torch.cat(parts)


def _samplers(
    items: Tensor, scale: float, weight: Tensor, validation: Tensor, seed: int
) -> Iterator[tuple[str, LogQ]]:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    yield "uniform", _fixed(torch.ones_like(weight))
    yield "popularity", _fixed(weight)
    yield "popularity^0.75", _fixed(weight**0.75)
    yield "inverted index, uniform inside", inverted_index(items, scale, generator())
    for estimator in ("trigonometric", "positive"):
        found = [
            feature_sampler(items, x, estimator, 1024, generator())
            for x in (1.0, 2.0, 4.0, 6.0, 8.0, scale)
        ]
        best = min(found, key=lambda x: chi_squared(validation, items, scale, x).median().item())
        yield f"RF-softmax, 1,024 {estimator} features", best
    yield "CatalogueSampler", two_level_sampler(items, scale, None, generator())
    if len(items) >= 64:
        yield "CatalogueSampler, 64 blocks", two_level_sampler(items, scale, 64, generator())


def measure_quality(index: str, steps: int, seed: int) -> Part:
    """Train on all rows but 2,200, choose temperatures on 200 of these, measure on 2,000.

    Returns:
        Sizes, ``negative_log_likelihood`` and ``recall`` (at 10) of the model, and the median and
        the mean of chi-squared by sampler.
    """
    rows, count = read_dependencies(index)
    torch.manual_seed(seed)
    source = random.Random(seed)
    source.shuffle(rows)
    held_out = min(2200, len(rows) // 4)
    validation_rows, test_rows = rows[: held_out // 11], rows[held_out // 11 : held_out]
    rows = rows[held_out:]
    context, items, scale = train(rows, count, steps, source)
    with torch.no_grad():
        validation, _ = _batch(validation_rows, source, context)
        query, target = _batch(test_rows, source, context)
        log_p = (scale * query @ items.T).log_softmax(-1)
        right = log_p.gather(1, target[:, None])
        part: Part = {
            "items": count,
            "packages": len(rows),
            "queries": len(query),
            "scale": scale,
            "negative_log_likelihood": -right.mean().item(),
            "recall": ((log_p > right).sum(1) < 10).float().mean().item(),
            "chi_squared": {},
        }
        for name, log_q in _samplers(items, scale, popularity(rows, count), validation, seed):
            value = chi_squared(query, items, scale, log_q)
            part["chi_squared"][name] = (value.median().item(), value.mean().item())
    return part
