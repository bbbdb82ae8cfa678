"""Losses over all items and over draws, of one signature, for models trained in turns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.catalogue import CatalogueSampler, sampled_softmax_loss
from performers.catalogue.loss import losses_of_draws

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mean loss of queries ``(Q, d)``, items ``(n, d)`` and targets ``(Q,)``."""


def full_loss(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the softmax over all items."""
    return F.cross_entropy(query @ items.T, target)


class FixedLoss:
    """Sampled softmax with draws from one distribution for all queries, corrected by log q."""

    def __init__(self, weight: Tensor, num_samples: int, *, shared: bool = False) -> None:
        self.weight, self.num_samples, self.shared = weight, num_samples, shared
        self.log_q = (weight / weight.sum()).log()
        self.steps = weight.double().cumsum(0)

    def __call__(self, query: Tensor, items: Tensor, target: Tensor) -> Tensor:
        """Loss of new draws."""
        shape = (self.num_samples,) if self.shared else (len(query), self.num_samples)
        point = torch.rand(shape, dtype=torch.float64) * self.steps[-1]
        ids = torch.searchsorted(self.steps, point, right=True).clamp_max_(len(items) - 1)
        return losses_of_draws(query, items, target, ids, self.log_q[ids]).mean()


class CatalogueLoss:
    """`sampled_softmax_loss` whose sampler follows the items.

    It takes them every ``update_every`` steps in the blocks that it has, and cuts blocks anew every
    ``cut_every``.
    """

    def __init__(
        self,
        items: Tensor,
        num_samples: int,
        *,
        shared: bool = False,
        update_every: int = 5,
        cut_every: int = 50,
    ) -> None:
        self.sampler = CatalogueSampler(items, generator=torch.Generator().manual_seed(0))
        self.num_samples, self.shared = num_samples, shared
        self.update_every, self.cut_every = update_every, cut_every
        self.step = 0

    def __call__(self, query: Tensor, items: Tensor, target: Tensor) -> Tensor:
        """Loss of new draws."""
        if self.step % self.cut_every == 0:
            self.sampler.refresh_(items)
        elif self.step % self.update_every == 0:
            self.sampler.update_(torch.arange(len(items)), items)
        self.step += 1
        return sampled_softmax_loss(
            query, items, target, self.sampler, self.num_samples, shared=self.shared
        )
