"""Sequences as runs of blocks, and the blocks that each block sees in BigBird."""

from typing import NamedTuple

import torch
from torch import Tensor

from performers.models.context import AttentionContext


class BlockLayout(NamedTuple):
    """Where tokens stand when each sequence begins a block of its own.

    Masked tokens are left out. ``T`` blocks hold ``N`` sequences with ``M`` tokens in all.

    Attributes:
        tokens: The tokens among all ``B * L``, in order, ``(M,)``.
        slots: Where each stands among the ``T * size`` slots, ``(M,)``.
        sources: The token in each slot, 0 where there is none, ``(T * size,)``.
        filled: Which slots have one, ``(T, size)``.
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
        layout: Of ``T`` blocks.
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
