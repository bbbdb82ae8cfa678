"""Sampling from the softmax over a catalogue of items."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from performers.catalogue.blocks import balanced_blocks

# Scores held at a time.
_SCORES = 1 << 24


class CatalogueSampler(nn.Module):
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

    items: Tensor  # (K, S, d), by block
    ids: Tensor  # (K, S), -1 pads
    place: Tensor  # (n,), index into the flat ids
    mean: Tensor  # (K, d)
    variance: Tensor  # (K, d)
    radius: Tensor  # (K,)

    def __init__(
        self,
        items: Tensor,
        *,
        scale: float = 1.0,
        num_blocks: int | None = None,
        mix: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 < mix < 1:
            raise ValueError(f"mix must lie between 0 and 1, got {mix}")
        self.scale = scale
        self.mix = mix
        self._num_blocks = num_blocks
        for name in ("items", "ids", "place", "mean", "variance", "radius"):
            self.register_buffer(name, torch.empty(0))
        self.refresh_(items, generator)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.place)

    @torch.no_grad()
    def refresh_(self, items: Tensor, generator: torch.Generator | None = None) -> CatalogueSampler:
        """Copy the items and cut them into blocks anew.

        Args:
            items: Shape ``(n, d)``; ``n`` may differ from that before.
            generator: Source of the first directions along which blocks are cut.

        Raises:
            ValueError: ``items`` is not a matrix of finite numbers, or has fewer rows than
                ``num_blocks``.
        """
        items = _finite(items.detach(), "items")
        if items.dim() != 2 or items.numel() == 0:
            raise ValueError(f"items must have the shape (n, d), got {tuple(items.shape)}")
        count = len(items)
        blocks = self._num_blocks or 2 ** round(math.log2(math.sqrt(count)))
        if blocks & (blocks - 1) or not 1 <= blocks <= count:
            raise ValueError(
                f"num_blocks must be a power of two of at most {count} items, got {blocks}"
            )
        self.ids = balanced_blocks(items, blocks, generator)
        flat = self.ids.flatten()
        kept = (flat >= 0).nonzero().squeeze(1)
        self.place = torch.empty(count, dtype=torch.int64, device=items.device)
        self.place[flat[kept]] = kept
        self.items = items[self.ids.clamp_min(0)]
        self._describe(torch.arange(blocks, device=items.device))
        return self

    @torch.no_grad()
    def update_(self, ids: Tensor, items: Tensor) -> CatalogueSampler:
        """Replace items where they lie; blocks are not cut anew.

        Args:
            ids: Row numbers, shape ``(k,)``, each at most once.
            items: Their new values, shape ``(k, d)``.

        Raises:
            ValueError: An id is out of range or given twice, or ``items`` has another shape or is
                not finite.
        """
        ids = self._checked(ids, "ids").to(self.ids.device)
        items = _finite(items.detach(), "items")
        if ids.dim() != 1 or items.shape != (len(ids), self.items.shape[-1]):
            raise ValueError(
                f"items must have the shape ({ids.numel()}, {self.items.shape[-1]}), "
                f"got {tuple(items.shape)}"
            )
        if len(ids.unique()) < len(ids):
            raise ValueError("ids must name each item at most once")
        place = self.place[ids]
        self.items.view(-1, self.items.shape[-1])[place] = items.to(self.items)
        self._describe((place // self.ids.shape[1]).unique())
        return self

    def _describe(self, blocks: Tensor) -> None:
        """Mean, variances and radius of some blocks."""
        if len(self.mean) != len(self.ids):
            shape = (len(self.ids), self.items.shape[-1])
            self.mean, self.variance = self.items.new_zeros(shape), self.items.new_zeros(shape)
            self.radius = self.items.new_zeros(len(self.ids))
        items, kept = self.items[blocks], (self.ids[blocks] >= 0).unsqueeze(-1)
        count = kept.sum(1)
        mean = (items * kept).sum(1) / count
        offset = (items - mean.unsqueeze(1)) * kept
        self.mean[blocks] = mean
        self.variance[blocks] = offset.square().sum(1) / count
        self.radius[blocks] = torch.linalg.vector_norm(offset, dim=-1).amax(1)

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
            ids, log_q = self._sample_shared(query, share, num_samples, generator)
            return ids, log_q
        parts = [
            self._sample(part, log_share, num_samples, generator)
            for part, log_share in zip(
                *_split(num_samples * self.ids.shape[1], query, share), strict=True
            )
        ]
        ids, log_q = (
            torch.cat(column).view(*shape, num_samples) for column in zip(*parts, strict=True)
        )
        return ids, log_q

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
        parts = [
            self._log_prob(part, share, self.place[numbers])
            for part, share, numbers in zip(
                *_split(flat.shape[1] * self.ids.shape[1], query, self._log_share(query), flat),
                strict=True,
            )
        ]
        return torch.cat(parts).view(*shape, -1)

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
            parts = [
                torch.logsumexp(self._scores(part @ self.items.flatten(0, 1).T), dim=-1)
                for (part,) in zip(*_split(blocks * size, query), strict=True)
            ]
            value = torch.cat(parts)
            return value.view(shape), torch.zeros_like(value).view(shape)
        share = self._log_share(query)
        drawn = torch.multinomial(share.exp(), num_samples, replacement=True, generator=generator)
        weight = self._log_sums(query, drawn) - share.gather(1, drawn)
        top = weight.amax(1, keepdim=True)
        ratio = (weight - top).exp()
        mean = ratio.mean(1)
        error = ratio.std(1) / (math.sqrt(num_samples) * mean)
        return (top.squeeze(1) + mean.log()).view(shape), error.view(shape)

    @torch.no_grad()
    def top_k(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The items with the largest inner products, exactly.

        Blocks are searched in the order of the bound ``x·μ_b + |x| r_b`` until no block can hold a
        better item. Where bounds exclude little, as for items without clusters, the search ends in
        the product with all items.

        Args:
            query: Shape ``(..., d)``.
            k: Number of items, at most all.

        Returns:
            ``scale x·e``, descending, and item numbers, shapes ``(..., k)``.

        Raises:
            ValueError: ``k`` is out of range, or ``query`` has another width than the items.
        """
        query, shape = self._flat(query)
        if not 1 <= k <= self.num_items:
            raise ValueError(f"k must lie between 1 and {self.num_items}, got {k}")
        parts = [
            self._top_k(part, k) for (part,) in zip(*_split(self.ids.numel(), query), strict=True)
        ]
        values, ids = (torch.cat(column).view(*shape, k) for column in zip(*parts, strict=True))
        return values, ids

    def _flat(self, query: Tensor) -> tuple[Tensor, torch.Size]:
        """Queries times scale as a matrix, in the items' precision, and the leading shape."""
        if query.dim() < 1 or query.shape[-1] != self.items.shape[-1]:
            raise ValueError(
                f"query must have the shape (..., {self.items.shape[-1]}), got {tuple(query.shape)}"
            )
        flat = _finite(query.detach(), "query").to(self.items)
        return self.scale * flat.reshape(-1, flat.shape[-1]), query.shape[:-1]

    def _checked(self, ids: Tensor, name: str) -> Tensor:
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {ids.dtype}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_items:
            raise ValueError(
                f"{name} must lie between 0 and {self.num_items - 1}, got "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        return ids

    def _log_share(self, query: Tensor) -> Tensor:
        """Logarithms of the estimated shares of the blocks, shape (Q, K)."""
        norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
        spread = torch.minimum(query.square() @ self.variance.T / 2, norm * self.radius)
        count = (self.ids >= 0).sum(1).log()
        return (query @ self.mean.T + spread + count).log_softmax(dim=-1)

    def _scores(self, products: Tensor) -> Tensor:
        """Products with all places, -inf where there is no item."""
        return products.masked_fill_(self.ids.flatten() < 0, -math.inf)

    def _groups(self, pair_query: Tensor, pair_block: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a query and a block in groups of one matrix product each.

        Yields:
            Blocks of the group, shape ``(g,)``, and numbers of pairs for each, ``(g, c)``, padded
            by repetition. Blocks of a group have similarly many pairs.
        """
        order = pair_block.argsort()
        blocks, counts = torch.unique_consecutive(pair_block[order], return_counts=True)
        start = counts.cumsum(0) - counts
        width = counts.double().log2().ceil()
        for level in width.unique().tolist():
            chosen = (width == level).nonzero().squeeze(1)
            most = int(counts[chosen].max())
            column = torch.arange(most, device=order.device)
            column = torch.minimum(column, (counts[chosen] - 1).unsqueeze(1))
            yield blocks[chosen], order[start[chosen].unsqueeze(1) + column]

    def _pair_scores(self, query: Tensor, pair_query: Tensor, pair_block: Tensor) -> Tensor:
        """Scores of the items of a block for pairs of a query and a block, shape (P, S)."""
        scores = query.new_empty(len(pair_query), self.ids.shape[1])
        for blocks, pairs in self._groups(pair_query, pair_block):
            product = query[pair_query[pairs]] @ self.items[blocks].mT
            product.masked_fill_((self.ids[blocks] < 0).unsqueeze(1), -math.inf)
            scores[pairs] = product
        return scores

    def _pairs(self, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct pairs of a query and a block among draws (Q, n), and each draw's pair."""
        blocks = len(self.ids)
        code = torch.arange(len(drawn), device=drawn.device).unsqueeze(1) * blocks + drawn
        code, pair = code.unique(return_inverse=True)
        return code // blocks, code % blocks, pair

    def _log_sums(self, query: Tensor, drawn: Tensor) -> Tensor:
        """Logarithms of the sums over drawn blocks, shape (Q, n)."""
        parts = []
        for part, blocks in zip(
            *_split(drawn.shape[1] * self.ids.shape[1], query, drawn), strict=True
        ):
            pair_query, pair_block, pair = self._pairs(blocks)
            sums = torch.logsumexp(self._pair_scores(part, pair_query, pair_block), dim=-1)
            parts.append(sums[pair])
        return torch.cat(parts)

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
        pair_query, pair_block, pair = self._pairs(drawn)
        scores = self._pair_scores(query, pair_query, pair_block)
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

    def _log_prob(self, query: Tensor, share: Tensor, place: Tensor) -> Tensor:
        size = self.ids.shape[1]
        drawn = place // size
        pair_query, pair_block, pair = self._pairs(drawn)
        log_inside = self._pair_scores(query, pair_query, pair_block).log_softmax(dim=-1)
        return self._mixed(share.gather(1, drawn) + log_inside[pair, place % size])

    def _mixed(self, log_two_level: Tensor) -> Tensor:
        """Logarithm of the mixture with the uniform distribution."""
        floor = math.log(self.mix / self.num_items)
        return torch.logaddexp(
            log_two_level + math.log1p(-self.mix), log_two_level.new_tensor(floor)
        )

    def _top_k(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        blocks, size = self.ids.shape
        norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
        reach = norm * self.radius
        bound = query @ self.mean.T + reach
        # Rounding of the bound and of the scores.
        bound += 1e-5 * (bound.abs() + reach)
        bound, order = bound.sort(dim=1, descending=True)
        values = query.new_full((len(query), k), -math.inf)
        places = torch.zeros(len(query), k, dtype=torch.int64, device=query.device)
        active, done = torch.arange(len(query), device=query.device), 0
        step = max(1, math.ceil(k / size))
        while len(active) and done < blocks:
            if 4 * done >= blocks:
                scores = self._scores(query[active] @ self.items.flatten(0, 1).T)
                values[active], places[active] = scores.topk(k)
                break
            step = min(step, blocks - done)
            drawn = order[active, done : done + step]
            pair_query, pair_block, pair = self._pairs(drawn)
            scores = self._pair_scores(query[active], pair_query, pair_block)[pair].flatten(1)
            place = (drawn.unsqueeze(-1) * size).expand(-1, -1, size)
            place = (place + torch.arange(size, device=query.device)).flatten(1)
            values[active], best = torch.cat((values[active], scores), dim=1).topk(k)
            places[active] = torch.cat((places[active], place), dim=1).gather(1, best)
            done, step = done + step, 2 * step
            if done < blocks:
                active = active[values[active, -1] < bound[active, done]]
        return values, self.ids.flatten()[places]

    def extra_repr(self) -> str:
        """Sizes and options."""
        blocks, size = self.ids.shape
        return (
            f"{self.num_items} items of width {self.items.shape[-1]} in {blocks} blocks of {size}, "
            f"scale={self.scale}, mix={self.mix}"
        )


def _finite(x: Tensor, name: str) -> Tensor:
    """The tensor in float32 at least.

    Raises:
        ValueError: A row holds NaN or infinity.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not bool(torch.isfinite(x.sum())):
        wrong = (~torch.isfinite(x)).any(-1).nonzero()
        if len(wrong):
            raise ValueError(f"{name} holds NaN or infinity in row {wrong[0].tolist()}")
    return x


def _random(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)


def _split(elements_per_query: int, *tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Tensors cut along the queries so that a part has about as many scores as are held."""
    rows = max(1, _SCORES // max(1, elements_per_query))
    return tuple(tensor.split(rows) for tensor in tensors)
