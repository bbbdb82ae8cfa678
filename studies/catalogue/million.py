"""A million items: processor time and memory of a sampler, beside one full product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from performers.benchmark.memory import run_apart
from performers.catalogue import CatalogueSampler, sampled_softmax_loss
from studies.catalogue.negatives import full_loss
from studies.catalogue.quality import chi_squared
from studies.parts import Part
from studies.training import cost

KINDS = ("clusters", "random")

_DIM = 64
_QUERIES = 256
_MEBIBYTE = 2**20


def make_items(kind: str, count: int) -> tuple[Tensor, Tensor]:
    """Items of norm about 3, around √n centres or Gaussian, and queries like them."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(count, _DIM, generator=generator)
    if kind == "clusters":
        centres = torch.randn(round(count**0.5), _DIM, generator=generator)
        items = 0.4 * items + centres[torch.randint(len(centres), (count,), generator=generator)]
    items *= 3 / _DIM**0.5
    chosen = torch.randint(count, (_QUERIES,), generator=generator)
    noise = torch.randn(_QUERIES, _DIM, generator=generator)
    return items, items[chosen] + 0.1 * noise


def measure_million(kind: str, count: int) -> Part:
    """Times and peak memory, in a process of its own.

    Returns:
        ``seconds`` (of the processor) and ``mebibytes`` (above those of the items) by operation,
        and the median and the mean of chi-squared over 64 queries.
    """
    return run_apart(partial(measure_here, kind=kind, count=count), threads=1)


def measure_here(kind: str, count: int) -> Part:
    """`measure_million` in this process."""
    items, query = make_items(kind, count)
    target = torch.randint(count, (_QUERIES,))
    sampler: list[CatalogueSampler] = []
    seconds, mebibytes = {}, {}

    def measure(name: str, call: Callable[[], object]) -> None:
        seconds[name], nbytes = cost(call)
        mebibytes[name] = nbytes / _MEBIBYTE

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in (query, items)]
        torch.autograd.grad(loss(*leaves), leaves)

    measure("build", lambda: sampler.append(CatalogueSampler(items)))
    measure("sample 20", lambda: sampler[0].sample(query, 20))
    measure("sample 2,000 shared", lambda: sampler[0].sample(query, 2000, shared=True))
    measure(
        "loss and gradients, 20",
        lambda: gradients(lambda x, y: sampled_softmax_loss(x, y, target, sampler[0], 20)),
    )
    measure(
        "loss and gradients, 2,000 shared",
        lambda: gradients(
            lambda x, y: sampled_softmax_loss(x, y, target, sampler[0], 2000, shared=True)
        ),
    )
    measure("loss and gradients, full", lambda: gradients(lambda x, y: full_loss(x, y, target)))
    measure("product with all items", lambda: query @ items.T)
    new, every = items + 0.01, torch.arange(count)
    measure("update_ of all items", lambda: sampler[0].update_(every, new))
    measure("refresh_", lambda: sampler[0].refresh_(new))
    value = chi_squared(
        query[:64], new, 1.0, lambda x: sampler[0].log_prob(x, every.expand(len(x), -1))
    )
    return {
        "seconds": seconds,
        "mebibytes": mebibytes,
        "sampler_mebibytes": sum(x.nbytes for x in sampler[0].buffers()) / _MEBIBYTE,
        "chi_squared": (value.median().item(), value.mean().item()),
    }
