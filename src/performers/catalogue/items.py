"""Items in blocks of neighbours: scores of some blocks, and the best items of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

# Scores held at a time.
_SCORES = 1 << 24
_POWER_STEPS = 6
_MEANS_STEPS = 4


class BlockedItems(nn.Module):
    """A copy of items, cut into blocks of equally many neighbours, as in `CatalogueSampler`."""

    items: Tensor  # (K, S, d), by block
    ids: Tensor  # (K, S), -1 pads
    place: Tensor  # (n,), index into the flat ids
    mean: Tensor  # (K, d)
    variance: Tensor  # (K, d)
    radius: Tensor  # (K,)

    def __init__(
        self,
        items: Tensor,
        scale: float,
        num_blocks: int | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self._num_blocks = num_blocks
        for name in ("items", "ids", "place", "mean", "variance", "radius"):
            self.register_buffer(name, torch.empty(0))
        self.refresh_(items, generator)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.place)

    @torch.no_grad()
    def refresh_(self, items: Tensor, generator: torch.Generator | None = None) -> Self:
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
        self.mean, self.variance = (items.new_zeros(blocks, items.shape[1]) for _ in range(2))
        self.radius = items.new_zeros(blocks)
        self._describe(torch.arange(blocks, device=items.device))
        return self

    @torch.no_grad()
    def update_(self, ids: Tensor, items: Tensor) -> Self:
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
        values, ids = by_parts(lambda part: self._top_k(part, k), self.ids.numel(), query)
        return values.view(*shape, k), ids.view(*shape, k)

    def _describe(self, blocks: Tensor) -> None:
        """Mean, variances and radius of some blocks."""
        items, kept = self.items[blocks], (self.ids[blocks] >= 0).unsqueeze(-1)
        count = kept.sum(1)
        mean = (items * kept).sum(1) / count
        offset = (items - mean.unsqueeze(1)) * kept
        self.mean[blocks] = mean
        self.variance[blocks] = offset.square().sum(1) / count
        self.radius[blocks] = torch.linalg.vector_norm(offset, dim=-1).amax(1)

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

    def _scores(self, products: Tensor) -> Tensor:
        """Products with all places, -inf where there is no item."""
        return products.masked_fill_(self.ids.flatten() < 0, -math.inf)

    def _block_scores(self, query: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Scores within blocks drawn for queries, shape (Q, n).

        Returns:
            Scores of the items of each distinct pair of a query and a block, shape (P, S), and the
            pair of each draw, shape (Q, n).
        """
        count, size = self.ids.shape
        code = torch.arange(len(drawn), device=drawn.device).unsqueeze(1) * count + drawn
        code, pair = code.unique(return_inverse=True)
        pair_query, pair_block = code // count, code % count
        scores = query.new_empty(len(code), size)
        order = pair_block.argsort()
        blocks, counts = torch.unique_consecutive(pair_block[order], return_counts=True)
        start = counts.cumsum(0) - counts
        # One product for all blocks with similarly many pairs, which are padded by repetition.
        width = counts.double().log2().ceil()
        for level in width.unique().tolist():
            chosen = (width == level).nonzero().squeeze(1)
            column = torch.arange(int(counts[chosen].max()), device=order.device)
            column = torch.minimum(column, (counts[chosen] - 1).unsqueeze(1))
            pairs, group = order[start[chosen].unsqueeze(1) + column], blocks[chosen]
            product = query[pair_query[pairs]] @ self.items[group].mT
            scores[pairs] = product.masked_fill_((self.ids[group] < 0).unsqueeze(1), -math.inf)
        return scores, pair

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
            scores, pair = self._block_scores(query[active], drawn)
            scores = scores[pair].flatten(1)
            place = (drawn.unsqueeze(-1) * size).expand(-1, -1, size)
            place = (place + torch.arange(size, device=query.device)).flatten(1)
            values[active], best = torch.cat((values[active], scores), dim=1).topk(k)
            places[active] = torch.cat((places[active], place), dim=1).gather(1, best)
            done, step = done + step, 2 * step
            if done < blocks:
                active = active[values[active, -1] < bound[active, done]]
        return values, self.ids.flatten()[places]


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


def by_parts(
    function: Callable[..., tuple[Tensor, ...]], elements_per_query: int, *tensors: Tensor
) -> list[Tensor]:
    """Results for all queries of a function of some, of about as many scores as are held."""
    rows = max(1, _SCORES // max(1, elements_per_query))
    parts = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    return [torch.cat(x) for x in zip(*(function(*part) for part in parts), strict=True)]


def balanced_blocks(items: Tensor, num_blocks: int, generator: torch.Generator | None) -> Tensor:
    """Partition of items into blocks of neighbours whose sizes differ by one at most.

    Blocks are halved until there are enough of them, a power of two: at the median along the
    direction between two means, which begin at the principal direction (power iteration) and take a
    few steps of 2-means. Every level is a product ``O(n d²)`` and a few of ``O(n d)``.

    Returns:
        Row numbers of the items of each block, int64, shape ``(num_blocks, size)``; -1 pads.
    """
    count, dim = items.shape
    size = math.ceil(count / num_blocks) * num_blocks
    blocks = torch.full((1, size), -1, device=items.device)
    blocks[0, :count] = torch.arange(count, device=items.device)
    while len(blocks) < num_blocks:
        kept = blocks >= 0
        points = items[blocks.clamp_min(0)] * kept.unsqueeze(-1)
        points -= (points.sum(1) / kept.sum(1, keepdim=True)).unsqueeze(1)
        points *= kept.unsqueeze(-1)
        # Squares of huge items would overflow.
        points /= points.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(items.dtype).tiny)
        direction = torch.randn(len(blocks), dim, 1, generator=generator).to(points)
        squares = points.mT @ points
        for _ in range(_POWER_STEPS):
            direction = squares @ direction
            direction /= direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
        for _ in range(_MEANS_STEPS):
            right = _halves(points @ direction, kept).chunk(2, 1)[1]
            # Points sum to zero: the difference of the halves' means is along the right one's.
            side = points.new_zeros(kept.shape).scatter_(1, right, 1)
            direction = (side.unsqueeze(1) @ points).mT
        blocks = blocks.gather(1, _halves(points @ direction, kept)).view(2 * len(blocks), -1)
    return blocks


def _halves(along: Tensor, kept: Tensor) -> Tensor:
    """Order of a block's places whose two halves share items and padding evenly."""
    order = along.squeeze(-1).masked_fill(~kept, math.inf).argsort(dim=1)
    half = order.shape[1] // 2
    count = kept.sum(1, keepdim=True)
    left = (count + 1) // 2
    place = torch.arange(half, device=order.device)
    # The places of padding come last in `order`.
    first = torch.where(place < left, place, count + place - left)
    second = torch.where(place < count - left, left + place, half + place)
    return order.gather(1, torch.cat((first, second), dim=1))
