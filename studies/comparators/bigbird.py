"""BigBird's block pattern (Zaheer et al. 2020, arXiv 2007.14062): local, global and random."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from performers.features.precision import without_autocast
from performers.models.context import AttentionContext
from studies.comparators.blocks import attend, dense_weights, visible_pairs


class BlockLayout(NamedTuple):
    """Places of tokens when each sequence begins a block of its own.

    Masked tokens are left out. ``T`` blocks hold ``N`` sequences with ``M`` tokens in all.

    Attributes:
        tokens: The tokens among all ``B * L``, in order, ``(M,)``.
        slots: Where each stands among the ``T * size`` slots, ``(M,)``.
        sources: The token in each slot, 0 where there is none, ``(T * size,)``.
        filled: True for slots that have one, ``(T, size)``.
        sequence: The sequence of each block, ``(T,)``.
        number: The place of each block in its sequence, ``(T,)``.
        total: Blocks in the sequence of each block, ``(T,)``.
        first: The first block of each sequence, ``(N,)``.
        blocks: Blocks of each sequence, ``(N,)``.
    """

    tokens: Tensor
    slots: Tensor
    sources: Tensor
    filled: Tensor
    sequence: Tensor
    number: Tensor
    total: Tensor
    first: Tensor
    blocks: Tensor


class BigBirdMechanism(nn.Module):
    """Softmax attention from blocks of tokens to a few blocks each.

    A block sees itself and the two next to it, the first ``global_blocks`` of its sequence, and
    ``random_blocks`` others, fixed for each layer and head. The global blocks see all (the paper's
    internal construction). ``O(L * block_size * (3 + global_blocks + random_blocks))``. Blocks are
    counted from the first token of each sequence that is not masked. The causal form hides later
    tokens, and random blocks are then earlier ones.

    Args:
        block_size: Tokens in a block.
        global_blocks: First blocks of a sequence that all see and that see all.
        random_blocks: Random blocks that each block sees.
    """

    def __init__(self, block_size: int, global_blocks: int, random_blocks: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.global_blocks = global_blocks
        self.random_blocks = random_blocks

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; all of shape ``(B, H, L, head_dim)``; the matrix is ``(B, H, L, L)`` or None."""
        batch, heads, length, width = query.shape
        layout = block_layout(context, batch, length, self.block_size, query.device)
        if not len(layout.tokens):
            zero = torch.zeros_like(value)
            empty = zero.new_zeros(batch, heads, length, length) if context.need_weights else None
            return zero, empty
        chosen, valid = chosen_blocks(
            layout,
            num_heads=heads,
            num_global=self.global_blocks,
            num_random=self.random_blocks,
            is_causal=context.is_causal,
            layer=layer,
        )
        weights = None
        if context.need_weights:
            allowed = self._dense(layout, chosen, valid, batch, length, context)
            weights = dense_weights(query, key, allowed)
        queries, keys, values = (
            # (T, H, size, head_dim)
            x.transpose(1, 2)
            .reshape(batch * length, heads, width)
            .index_select(0, layout.sources)
            .unflatten(0, (-1, self.block_size))
            .transpose(1, 2)
            for x in (query, key, value)
        )
        out = self._sparse(queries, keys, values, layout, chosen, valid, context.is_causal)
        if not context.is_causal and self.global_blocks:
            places, rows = self._global(queries, keys, values, layout)
            out = out.index_copy(0, places, rows.to(out.dtype))
        out = out.transpose(1, 2).flatten(0, 1).index_select(0, layout.slots)
        result = out.new_zeros(batch * length, heads, width).index_copy(0, layout.tokens, out)
        return result.unflatten(0, (batch, length)).transpose(1, 2), weights

    def _sparse(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: BlockLayout,
        chosen: Tensor,
        valid: Tensor,
        is_causal: bool,
    ) -> Tensor:
        """Attention of each block to the blocks it sees, ``(T, H, size, head_dim)``."""
        blocks, heads, size, _ = queries.shape
        head = torch.arange(heads, device=chosen.device)[:, None]
        rows = (chosen * heads + head).flatten()
        keys, values = (
            x.reshape(blocks * heads, -1)
            .index_select(0, rows)
            .view(blocks, heads, chosen.shape[-1] * size, -1)
            for x in (keys, values)
        )
        allowed = (layout.filled[chosen] & valid.unsqueeze(-1)).flatten(2).unsqueeze(2)
        if is_causal:
            # Of the blocks seen only the own one, the first, holds later tokens.
            earlier = torch.ones(size, keys.shape[2], dtype=torch.bool, device=keys.device)
            earlier[:, :size].tril_()
            allowed = allowed & earlier
        return attend(queries, keys, values, allowed)

    def _global(
        self, queries: Tensor, keys: Tensor, values: Tensor, layout: BlockLayout
    ) -> tuple[Tensor, Tensor]:
        """Attention of the global blocks to their whole sequence, and the indices of these blocks.

        Each block's share is computed on its own; shares of a sequence are added up.
        """
        number = torch.arange(self.global_blocks, device=keys.device)
        # A sequence may have fewer blocks: its last one stands in and is dropped again.
        held = number < layout.blocks[:, None]
        places = layout.first[:, None] + torch.minimum(number, layout.blocks[:, None] - 1)
        dtype = torch.promote_types(queries.dtype, torch.float32)
        with without_autocast(queries.device):
            leading = queries.to(dtype).index_select(0, places.flatten())
            leading = leading.unflatten(0, places.shape).transpose(1, 2).flatten(2, 3)
            scale = queries.shape[-1] ** -0.5
            asking = leading.index_select(0, layout.sequence)
            scores = asking @ keys.to(dtype).transpose(-1, -2) * scale
            scores = scores.masked_fill(~layout.filled[:, None, None], -torch.inf)
            highest = scores.detach().amax(-1)
            index = layout.sequence[:, None, None].expand_as(highest)
            high = highest.new_full(leading.shape[:3], -torch.inf)
            high = high.scatter_reduce(0, index, highest, "amax")
            exponentials = (scores - high[layout.sequence].unsqueeze(-1)).exp()
            parts = exponentials @ values.to(dtype)
            out = torch.zeros_like(leading).index_add(0, layout.sequence, parts)
            total = out.new_zeros(leading.shape[:3])
            total = total.index_add(0, layout.sequence, exponentials.sum(-1))
            out = out / total.unsqueeze(-1)
        out = out.unflatten(2, (self.global_blocks, -1)).transpose(1, 2)
        return places[held], out[held]

    @torch.no_grad()
    def _dense(
        self,
        layout: BlockLayout,
        chosen: Tensor,
        valid: Tensor,
        batch: int,
        length: int,
        context: AttentionContext,
    ) -> Tensor:
        """The pattern between all tokens, ``(B, H, L, L)``."""
        blocks = len(layout.number)
        seen = torch.zeros(*chosen.shape[:2], blocks, dtype=torch.int64, device=chosen.device)
        seen = seen.scatter_add_(2, chosen, valid.long()).transpose(0, 1) > 0
        if not context.is_causal:
            same = layout.sequence[:, None] == layout.sequence
            seen = seen | (same & (layout.number < self.global_blocks)[:, None])
        place = torch.zeros(batch * length, dtype=torch.int64, device=chosen.device)
        place[layout.tokens] = layout.slots // self.block_size
        place = place.view(batch, length)
        pairs = seen[:, place[:, :, None], place[:, None, :]].transpose(0, 1)
        return pairs & visible_pairs(context, length, chosen.device)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return (
            f"block_size={self.block_size}, global_blocks={self.global_blocks}, "
            f"random_blocks={self.random_blocks}"
        )


@torch.no_grad()
def block_layout(
    context: AttentionContext, batch: int, length: int, size: int, device: torch.device
) -> BlockLayout:
    """Lay the sequences of a call out in blocks of ``size`` tokens."""
    sequence = torch.arange(batch, device=device)[:, None].expand(-1, length)
    if context.sequence_ids is not None:
        sequence = sequence * (length + 1) + context.sequence_ids
    tokens = torch.arange(batch * length, device=device)
    if context.key_mask is not None:
        tokens = context.key_mask.flatten().nonzero().squeeze(-1)
    _, number, lengths = sequence.flatten()[tokens].unique_consecutive(
        return_inverse=True, return_counts=True
    )
    blocks = (lengths + size - 1) // size
    first = blocks.cumsum(0) - blocks
    rank = torch.arange(len(tokens), device=device) - (lengths.cumsum(0) - lengths)[number]
    slots = first[number] * size + rank
    owner = torch.arange(len(blocks), device=device).repeat_interleave(blocks)
    sources = tokens.new_zeros(len(owner) * size).index_copy(0, slots, tokens)
    filled = torch.zeros(len(owner) * size, dtype=torch.bool, device=device)
    filled[slots] = True
    return BlockLayout(
        tokens=tokens,
        slots=slots,
        sources=sources,
        filled=filled.view(-1, size),
        sequence=owner,
        number=torch.arange(len(owner), device=device) - first[owner],
        total=blocks[owner],
        first=first,
        blocks=blocks,
    )


@torch.no_grad()
def chosen_blocks(
    layout: BlockLayout,
    *,
    num_heads: int,
    num_global: int,
    num_random: int,
    is_causal: bool,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """The blocks that each block sees: its own first, no block twice.

    They are the block itself, the ones next to it, the first ``num_global`` of the sequence, and
    ``num_random`` of the rest: one from each of as many equal parts. The causal form sees blocks
    up to its own only. What is random is a function of layer, head, number of the block and, in the
    bidirectional form, of blocks in the sequence: the same in every call.

    Args:
        layout: Layout of ``T`` blocks.
        num_heads: Heads, which differ in their random blocks.
        num_global: First blocks that all see.
        num_random: Random blocks.
        is_causal: Whether later blocks are hidden.
        layer: Index of the layer.

    Returns:
        Blocks among all ``T``, and which of these entries count, both ``(T, num_heads, K)``.
    """
    index, count = layout.number[:, None], layout.total[:, None]
    device = index.device
    picks, counts = [index], [torch.ones_like(index, dtype=torch.bool)]
    for near in (index - 1,) if is_causal else (index - 1, index + 1):
        picks.append(near)
        counts.append((near >= num_global) & (near < count))
    leading = torch.arange(num_global, device=device).expand(len(index), -1)
    picks.append(leading)
    counts.append((leading < index) if is_causal else (leading < count) & (leading != index))
    picks, counts = (
        [x[:, None].expand(-1, num_heads, -1) for x in columns] for columns in (picks, counts)
    )
    if num_random:
        # The rest: those before the neighbours, and those behind them.
        before = (index - 1 - num_global).clamp_min(0)
        begin = (index + 2).clamp_min(num_global)
        behind = torch.zeros_like(count) if is_causal else (count - begin).clamp_min(0)
        part = torch.arange(num_random + 1, device=device)
        bounds = (before + behind) * part // num_random
        low, high = bounds[:, :-1], bounds[:, 1:]
        heads = torch.arange(num_heads, device=device)[:, None]
        seed = _scramble((layer * num_heads + heads) * num_random + part[:-1] + 1)
        drawn = _scramble(_scramble(index[:, None]) ^ seed)
        place = low[:, None] + drawn % (high - low).clamp_min(1)[:, None]
        begin, before = begin[:, None], before[:, None]
        picks.append(torch.where(place < before, num_global + place, begin + place - before))
        counts.append((high > low)[:, None].expand_as(place))
    pick, valid = torch.cat(picks, dim=-1), torch.cat(counts, dim=-1)
    start = layout.first[layout.sequence][:, None, None]
    return torch.where(valid, start + pick, start), valid


def _scramble(x: Tensor) -> Tensor:
    """Integers below 2^32 as other ones without a pattern (a multiply-and-shift hash)."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (x >> 16) ^ x
