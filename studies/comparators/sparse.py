"""The factorised patterns of the Sparse Transformer (Child et al. 2019, arXiv 1904.10509)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.app.options import OptionError, option
from studies.comparators.blocks import (
    AttentionOptions,
    Comparator,
    SequenceRows,
    attend_allowed,
    attend_window,
    join_columns,
    split_blocks,
    take_columns,
)

Pattern = Literal["strided", "fixed"]
PATTERNS: tuple[str, ...] = get_args(Pattern)


@dataclass(frozen=True, kw_only=True)
class SparseOptions(AttentionOptions):
    """Options of ``sparse``."""

    stride: int | None = option(
        "Tokens of a block, and of the window; None is the square root of "
        "max_position_embeddings, rounded up, or summary where that is more.",
        None,
        at_least=1,
    )
    pattern: Pattern = option("strided or fixed.", "strided", choices=PATTERNS)
    summary: int = option(
        "Last tokens of each block that the fixed pattern shows to all.", 8, at_least=1
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.pattern == "fixed" and self.stride is not None and self.summary > self.stride:
            raise OptionError(
                f"summary must be at most the stride, {self.stride}, got {self.summary}"
            )

    def completed(self, longest: int) -> AttentionOptions:
        """See `AttentionOptions.completed`."""
        root = math.isqrt(longest - 1) + 1
        return replace(self, stride=self.stride or max(root, self.summary))


class SparseMechanism(Comparator):
    """Softmax attention in two patterns that reach every token in two steps.

    With ``s`` for the stride, a token ``i`` sees in one half of the heads the tokens near it and in
    the other half some that are spread over the sequence:

    * ``strided``: ``|i - j| <= s``; and ``i - j`` a multiple of ``s``.
    * ``fixed``: its block of ``s`` tokens; and the last ``summary`` tokens of every block. A token
      that sees none of them, in the causal form the first of a sequence, gets zeros.

    The causal form hides later tokens. The halves change places from layer to layer, so that a
    single head alternates (the paper's section 5.2 names heads and layers). Each half is dense
    attention on rearranged tokens: blocks, or columns of the sequence written in rows of ``s``.
    ``O(L * (s + L / s))``, and ``O(L * (s + summary * L / s))``; tokens are counted from the first
    of each sequence, masked ones left out.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """See `Comparator.attend`."""
        strided = self.options.pattern == "strided"
        halves = (self._near, self._columns) if strided else (self._block, self._summaries)
        first, count = rows.layer % 2, -(-query.shape[1] // 2)
        queries, keys, values = (x.split(count, dim=1) for x in (query, key, value))
        parts = enumerate(zip(queries, keys, values, strict=True))
        return torch.cat([halves[(first + n) % 2](q, k, v, rows) for n, (q, k, v) in parts], dim=1)

    def _near(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        stride = self.options.stride
        return attend_window(query, key, value, rows.ranks, stride, is_causal=rows.is_causal)

    def _columns(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        real = take_columns(rows.real[:, None, :, None], self.options.stride)
        queries, keys, values = (take_columns(x, self.options.stride) for x in (query, key, value))
        out = _attend_real(queries, keys, values, real, rows)
        return join_columns(out, self.options.stride, query.shape[2])

    def _block(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        real = _blocks(rows.real[:, None, :, None], self.options.stride)
        queries, keys, values = (_blocks(x, self.options.stride) for x in (query, key, value))
        out = _attend_real(queries, keys, values, real, rows).unflatten(0, (len(query), -1))
        return out.transpose(1, 2).flatten(2, 3)[:, :, : query.shape[2]]

    def _summaries(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        keys, values, real, ranks = (
            split_blocks(x, self.options.stride)[..., -self.options.summary :, :].flatten(-3, -2)
            for x in (key, value, rows.real.unsqueeze(-1), rows.ranks.unsqueeze(-1))
        )
        allowed = real.mT[:, None]
        if rows.is_causal:
            allowed = allowed & (ranks.mT <= rows.ranks.unsqueeze(-1))[:, None]
        return attend_allowed(query, keys, values, allowed)


def _blocks(x: Tensor, size: int) -> Tensor:
    """``(N, H, L, width)`` as ``(N * T, H, size, width)``."""
    return split_blocks(x, size).transpose(1, 2).flatten(0, 1)


def _attend_real(
    query: Tensor, key: Tensor, value: Tensor, real: Tensor, rows: SequenceRows
) -> Tensor:
    """Attention within each part of a sequence, ``real`` of shape ``(N, 1, L, 1)``."""
    if rows.is_causal:
        # What fills up a part is behind its tokens.
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attend_allowed(query, key, value, real.mT)
