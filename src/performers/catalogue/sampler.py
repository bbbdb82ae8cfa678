"""Sampling from the softmax over a catalogue of items."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from performers.catalogue.items import BlockedItems, by_parts


class CatalogueSampler(BlockedItems):
    r"""Sampler whose distribution is close to the softmax of inner products with all items.

    For a query ``x`` and items ``e_i`` the target is ``p(i|x) ∝ exp(scale x·e_i)``. Items lie in
    about ``√n`` blocks of neighbours. A block is drawn by an estimate of its share, an item in it
    by the exact softmax over the block::

        q(i|x) = (1 - mix) B(b(i)|x) exp(scale x·e_i) / Z_b(i)(x) + mix / n
        B(b|x) ∝ |b| exp(x·μ_b + min(½ Σ_l x_l² σ²_bl, |x| r_b)),  x times scale

    with the mean ``μ_b``, the variances ``σ²_b`` and the radius ``r_b`` of the block: the first two
    cumulants of ``x·e`` over a block, and its bound. A draw costs ``O(√n d)``, in matrix products
    that group queries by block. ``log_q`` is exact for the items that the sampler holds, which may
    be older than those that are scored.

    Args:
        items: Shape ``(n, d)``; a copy is kept.
        scale: Factor of the inner products.
        num_blocks: A power of two of at most ``n``; by default the one nearest to ``√n``. Fewer are
            closer to the softmax, and a draw costs more: at a quarter twice as much.
        mix: Share of the uniform distribution, in (0, 1): it bounds ``1/q`` by ``n / mix``.
        generator: Source of the first directions along which blocks are cut.

    Raises:
        ValueError: ``items`` is not a matrix of finite numbers, ``num_blocks`` is not a power of
            two of at most ``n``, or ``mix`` is outside (0, 1).

    Source: two-level sampling as in an inverted index, with the softmax inside a block; for
    sampled softmax Bengio and Senécal 2008, for kernel-based sampling Rawat et al. 2019
    (arXiv 1907.10747).
    """

    def __init__(
        self,
        items: Tensor,
        *,
        scale: float = 1.0,
        num_blocks: int | None = None,
        mix: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 < mix < 1:
            raise ValueError(f"mix must lie between 0 and 1, got {mix}")
        super().__init__(items, scale, num_blocks, generator)
        self.mix = mix

    @torch.no_grad()
    def sample(
        self,
        query: Tensor,
        num_samples: int,
        *,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Item numbers drawn with replacement, and the logarithms of their probabilities.

        Args:
            query: Shape ``(..., d)``.
            num_samples: Draws for each query, or for all together.
            shared: One set of draws for all queries, from a distribution of their mean: a block by
                its mean share, an item in it by the softmax of the queries' mean, weighted with
                their shares of the block. Cheaper for many queries, and further from each
                query's softmax.
            generator: Source of the draws.

        Returns:
            Item numbers (int64) and ``log q``, shapes ``(..., num_samples)``, or
            ``(num_samples,)`` where they are shared.

        Raises:
            ValueError: ``query`` is not finite or has another width than the items, or
                ``num_samples`` is below 1.
        """
        query, shape = self._flat(query)
        if num_samples < 1:
            raise ValueError(f"num_samples must be 1 at least, got {num_samples}")
        share = self._log_share(query)
        if shared:
            return self._sample_shared(query, share, num_samples, generator)
        ids, log_q = by_parts(
            lambda part, log_share: self._sample(part, log_share, num_samples, generator),
            num_samples * self.ids.shape[1],
            query,
            share,
        )
        return ids.view(*shape, num_samples), log_q.view(*shape, num_samples)

    @torch.no_grad()
    def log_prob(self, query: Tensor, ids: Tensor) -> Tensor:
        """Logarithm of the probability that ``sample`` draws an item.

        Args:
            query: Shape ``(..., d)``.
            ids: Item numbers, shape ``(..., k)``.

        Returns:
            Shape ``(..., k)``.

        Raises:
            ValueError: An id is out of range, or ``query`` has another width than the items.
        """
        query, shape = self._flat(query)
        ids = self._checked(ids, "ids")
        flat = ids.reshape(len(query), -1)
        size = self.ids.shape[1]

        def log_q(query: Tensor, share: Tensor, ids: Tensor) -> tuple[Tensor]:
            drawn, column = self.place[ids] // size, self.place[ids] % size
            scores, pair = self._block_scores(query, drawn)
            log_inside = scores.log_softmax(dim=-1)[pair, column]
            return (self._mixed(share.gather(1, drawn) + log_inside),)

        elements = flat.shape[1] * size
        return by_parts(log_q, elements, query, self._log_share(query), flat)[0].view(*shape, -1)

    @torch.no_grad()
    def log_partition(
        self, query: Tensor, num_samples: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Estimate of ``log Σ_i exp(scale x·e_i)`` and its standard error.

        The mean of ``Z_b / B(b)`` over blocks drawn with replacement, with ``Z_b`` exact. With as
        many samples as blocks or more, every block is summed and the error is zero.

        Args:
            query: Shape ``(..., d)``.
            num_samples: Blocks drawn for each query, 2 at least.
            generator: Source of the draws.

        Returns:
            Value and standard error, shapes ``(...)``.

        Raises:
            ValueError: ``num_samples`` is below 2, or ``query`` has another width than the items.
        """
        query, shape = self._flat(query)
        blocks, size = self.ids.shape
        if num_samples < min(2, blocks):
            raise ValueError(f"num_samples must be 2 at least, got {num_samples}")
        if num_samples >= blocks:

            def all_log_sums(query: Tensor) -> tuple[Tensor]:
                return (self._scores(query @ self.items.flatten(0, 1).T).logsumexp(-1),)

            value = by_parts(all_log_sums, blocks * size, query)[0].view(shape)
            return value, torch.zeros_like(value)

        def log_sums(query: Tensor, drawn: Tensor) -> tuple[Tensor]:
            scores, pair = self._block_scores(query, drawn)
            return (scores.logsumexp(-1)[pair],)

        share = self._log_share(query)
        drawn = torch.multinomial(share.exp(), num_samples, replacement=True, generator=generator)
        weight = by_parts(log_sums, num_samples * size, query, drawn)[0] - share.gather(1, drawn)
        top = weight.amax(1, keepdim=True)
        ratio = (weight - top).exp()
        mean = ratio.mean(1)
        error = ratio.std(1) / (math.sqrt(num_samples) * mean)
        return (top.squeeze(1) + mean.log()).view(shape), error.view(shape)

    def _log_share(self, query: Tensor) -> Tensor:
        """Logarithms of the estimated shares of the blocks, shape (Q, K)."""
        norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
        spread = torch.minimum(query.square() @ self.variance.T / 2, norm * self.radius)
        count = (self.ids >= 0).sum(1).log()
        return (query @ self.mean.T + spread + count).log_softmax(dim=-1)

    def _sample(
        self, query: Tensor, share: Tensor, count: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        shape, device = (len(query), count), query.device
        drawn = torch.multinomial(share.exp(), count, replacement=True, generator=generator)
        uniform = _random(shape, device, generator) < self.mix
        any_item = _random(shape, device, generator).mul_(self.num_items).long()
        any_place = self.place[any_item.clamp_max_(self.num_items - 1)]
        size = self.ids.shape[1]
        drawn = torch.where(uniform, any_place // size, drawn)
        scores, pair = self._block_scores(query, drawn)
        top = scores.amax(1, keepdim=True)
        steps = (scores - top).exp_().cumsum(dim=1)
        total = steps[:, -1:]
        # The distribution function of a pair is searched for all its draws at once.
        order = pair.flatten().argsort()
        counts = pair.flatten().bincount(minlength=len(steps))
        turn = torch.empty_like(order)
        turn[order] = torch.arange(len(order), device=device)
        turn = turn.view(shape) - (counts.cumsum(0) - counts)[pair]
        target = steps.new_zeros(len(steps), int(counts.max()))
        target[pair, turn] = _random(shape, device, generator).to(target)
        # Below the total, where only items of positive probability are.
        target = torch.minimum(target * total, total.nextafter(torch.zeros_like(total)))
        column = torch.searchsorted(steps, target, right=True)[pair, turn]
        column = torch.where(uniform, any_place % size, column)
        place = drawn * size + column
        log_inside = scores[pair, column] - (top + total.log()).squeeze(1)[pair]
        return self.ids.flatten()[place], self._mixed(share.gather(1, drawn) + log_inside)

    def _sample_shared(
        self, query: Tensor, share: Tensor, count: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        weight = share.exp()
        mass = weight.sum(0)
        mean = (weight.T @ query) / mass.clamp_min(1e-30).unsqueeze(1)
        scores = self._scores((self.items @ mean.unsqueeze(-1)).flatten()).view_as(self.ids)
        log_inside = scores.log_softmax(dim=-1)
        log_q = self._mixed((mass / mass.sum()).log().unsqueeze(1) + log_inside).flatten()
        log_q = log_q.masked_fill(self.ids.flatten() < 0, -math.inf)
        steps = log_q.double().exp().cumsum(0)
        target = _random((count,), query.device, generator) * steps[-1]
        place = torch.searchsorted(steps, target, right=True).clamp_max_(len(steps) - 1)
        return self.ids.flatten()[place], log_q[place]

    def _mixed(self, log_two_level: Tensor) -> Tensor:
        """Logarithm of the mixture with the uniform distribution."""
        floor = math.log(self.mix / self.num_items)
        return torch.logaddexp(
            log_two_level + math.log1p(-self.mix), log_two_level.new_tensor(floor)
        )

    def extra_repr(self) -> str:
        """Sizes and options."""
        blocks, size = self.ids.shape
        return (
            f"{self.num_items} items of width {self.items.shape[-1]} in {blocks} blocks of {size}, "
            f"scale={self.scale}, mix={self.mix}"
        )


def _random(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
