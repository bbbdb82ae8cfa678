"""BigBird's block pattern (Zaheer et al. 2020, arXiv 2007.14062): local, global and random."""

from dataclasses import dataclass

import torch
from torch import Tensor

from performers.app.options import option
from studies.comparators.blocks import (
    AttentionOptions,
    Comparator,
    SequenceRows,
    attend_allowed,
    split_blocks,
)


@dataclass(frozen=True, kw_only=True)
class BigBirdOptions(AttentionOptions):
    """Options of ``bigbird``."""

    block_size: int = option("Tokens in a block.", 64, at_least=1)
    global_blocks: int = option(
        "First blocks of a sequence that see all and that all see.", 2, at_least=0
    )
    random_blocks: int = option("Random blocks that each block sees.", 3, at_least=0)


class BigBirdMechanism(Comparator):
    """Softmax attention from blocks of tokens to a few blocks each.

    A block sees itself and the two next to it, the first ``global_blocks`` of its sequence, and
    ``random_blocks`` others, fixed for each layer and head. The global blocks see all (the paper's
    internal construction). ``O(L * block_size * (3 + global_blocks + random_blocks))``. Blocks are
    counted from the first token of each sequence that is not masked. The causal form hides later
    tokens, and random blocks are then earlier ones.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """See `Comparator.attend`."""
        options, (_, heads, longest, _) = self.options, query.shape
        size = options.block_size
        chosen, valid = _chosen_blocks(options, heads, rows)
        real = rows.real[:, None, :, None].expand(-1, heads, -1, -1)
        keys, values, allowed = (
            _take_blocks(split_blocks(x, size), chosen) for x in (key, value, real)
        )
        allowed = allowed.mT & valid.repeat_interleave(size, dim=-1).unsqueeze(-2)
        if rows.is_causal:
            # Of the blocks seen only the block itself, the first, has later tokens.
            earlier = allowed.new_ones(size, keys.shape[-2])
            earlier[:, :size].tril_()
            allowed = allowed & earlier
        blocks = (x.flatten(0, 1) for x in (split_blocks(query, size), keys, values, allowed))
        out = attend_allowed(*blocks).unflatten(0, (-1, heads)).flatten(2, 3)[:, :, :longest]
        end = 0 if rows.is_causal else options.global_blocks * size
        first = attend_allowed(query[:, :, :end], key, value, rows.real[:, None, None])
        return torch.cat((first, out[:, :, end:]), dim=2)


def _take_blocks(blocks: Tensor, chosen: Tensor) -> Tensor:
    """Chosen blocks ``(N, H, T, K)`` of ``(N, H, T, size, width)``, one after another."""
    flat = blocks.flatten(3)
    index = chosen.flatten(2).unsqueeze(-1).expand(-1, -1, -1, flat.shape[-1])
    return flat.gather(2, index).reshape(*chosen.shape[:3], -1, blocks.shape[-1])


@torch.no_grad()
def _chosen_blocks(
    options: BigBirdOptions, num_heads: int, rows: SequenceRows
) -> tuple[Tensor, Tensor]:
    """The blocks that each block of a sequence sees: itself first, no block twice.

    They are the block itself, the ones next to it, the global ones, and random ones of the rest:
    one from each of as many equal parts. The causal form sees blocks up to its own only. What is
    random is a function of layer, head, number of the block and, in the bidirectional form, of
    blocks in the sequence: the same in every call.

    Returns:
        Numbers of blocks, and which of these entries count, both ``(N, num_heads, T, K)``.
    """
    num_global, num_random = options.global_blocks, options.random_blocks
    total = -(-rows.lengths // options.block_size)
    device, count, is_causal = total.device, total[:, None, None, None], rows.is_causal
    index = torch.arange(int(total.max()), device=device)[:, None]
    entries = [(index, torch.ones_like(index, dtype=torch.bool))]
    for near in (index - 1,) if is_causal else (index - 1, index + 1):
        entries.append((near, (near >= num_global) & (near < count)))
    first = torch.arange(num_global, device=device)
    seen = first < index if is_causal else (first < count) & (first != index)
    entries.append((first, seen))
    if num_random:
        # The rest: those before the neighbours, and those behind them.
        before = (index - 1 - num_global).clamp_min(0)
        begin = (index + 2).clamp_min(num_global)
        behind = torch.zeros_like(count) if is_causal else (count - begin).clamp_min(0)
        part = torch.arange(num_random + 1, device=device)
        bounds = (before + behind) * part // num_random
        low, high = bounds[..., :-1], bounds[..., 1:]
        heads = torch.arange(num_heads, device=device)[:, None, None]
        seed = _scramble((rows.layer * num_heads + heads) * num_random + part[:-1] + 1)
        place = low + _scramble(_scramble(index) ^ seed) % (high - low).clamp_min(1)
        pick = torch.where(place < before, num_global + place, begin + place - before)
        entries.append((pick, high > low))
    shape = (len(total), num_heads, len(index), -1)
    picks, valid = (
        torch.cat([x.expand(shape) for x in one], dim=-1) for one in zip(*entries, strict=True)
    )
    return picks.where(valid, 0), valid


def _scramble(x: Tensor) -> Tensor:
    """Integers below 2^32 as other ones without a pattern (a multiply-and-shift hash)."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (x >> 16) ^ x
