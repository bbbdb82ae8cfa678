"""Sampled softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.catalogue.sampler import CatalogueSampler


def sampled_softmax_loss(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    sampler: CatalogueSampler,
    num_samples: int,
    *,
    shared: bool = False,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Cross-entropy of the softmax over all items, its normaliser estimated from samples.

    With the target ``t`` and draws ``i_1 ... i_n`` from ``q``::

        loss = log(exp(s_t) + (1/n) Σ_j [i_j ≠ t] exp(s_{i_j}) / q(i_j)) - s_t,  s_i = scale x·e_i

    The sum is an unbiased estimate of the normaliser (draws of the target count zero, since the
    target is in it already), so loss and gradient tend to those of the full softmax as
    ``num_samples`` grows; their bias falls as ``1/num_samples``. Gradients reach queries and items,
    not the sampler.

    Args:
        query: Shape ``(..., d)``.
        items: All items, shape ``(n, d)``; the sampler may hold older ones.
        target: Number of the right item, int64, shape ``(...)``.
        sampler: Sampler of the items; its ``scale`` is that of the loss.
        num_samples: Draws for each query, or for all together where they are shared.
        shared: One set of draws for all queries.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        generator: Source of the draws.

    Returns:
        A scalar, or shape ``(...)`` without reduction.

    Raises:
        ValueError: A target is out of range, a shape does not fit, ``query`` is not finite, or
            ``reduction`` is another word.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none; got {reduction!r}")
    if items.shape != (sampler.num_items, sampler.items.shape[-1]):
        raise ValueError(
            f"items must have the shape ({sampler.num_items}, {sampler.items.shape[-1]}) of the "
            f"sampler's, got {tuple(items.shape)}; sampler.refresh_(items) takes other ones"
        )
    if target.shape != query.shape[:-1]:
        raise ValueError(
            f"target must have the shape {tuple(query.shape[:-1])}, got {tuple(target.shape)}"
        )
    target = sampler._checked(target, "target").reshape(-1)
    flat = query.reshape(-1, query.shape[-1])
    ids, log_q = sampler.sample(flat, num_samples, shared=shared, generator=generator)
    loss = losses_of_draws(flat, items, target, ids, log_q, sampler.scale)
    if reduction == "none":
        return loss.view(query.shape[:-1])
    return loss.mean() if reduction == "mean" else loss.sum()


def losses_of_draws(
    query: Tensor, items: Tensor, target: Tensor, ids: Tensor, log_q: Tensor, scale: float = 1.0
) -> Tensor:
    """Losses of `sampled_softmax_loss` from draws of any sampler, shape ``(Q,)``.

    Args:
        query: Shape ``(Q, d)``.
        items: Shape ``(n, d)``.
        target: Shape ``(Q,)``.
        ids: Items drawn, shape ``(Q, m)``, or ``(m,)`` for all queries.
        log_q: Logarithms of their probabilities, of the shape of ``ids``.
        scale: Factor of the inner products.
    """
    query = scale * query
    count, shared = len(target), ids.dim() == 1
    if not shared and 2 * len(items) <= ids.shape[1] * items.shape[1]:
        # All scores take less memory and time than the rows of the drawn items.
        every = query @ items.T
        right, scores = every.gather(1, target.unsqueeze(1)), every.gather(1, ids)
    else:
        # One look-up: its gradient has the size of all items.
        rows = F.embedding(torch.cat((target, ids.flatten())), items)
        right = (query * rows[:count]).sum(-1, keepdim=True)
        drawn = rows[count:].view(*ids.shape, -1)
        scores = query @ drawn.T if shared else (drawn @ query.unsqueeze(-1)).squeeze(-1)
    correction = (log_q + math.log(ids.shape[-1])).to(scores.dtype)
    scores = (scores - correction).masked_fill(ids == target.unsqueeze(1), -math.inf)
    return (
        torch.logsumexp(torch.cat((right, scores), dim=1), dim=1, keepdim=True) - right
    ).squeeze(1)
