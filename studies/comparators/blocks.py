"""Parts that the mechanisms share: sequences as rows, rows as blocks, attention under a mask."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers.app.options import Options
from performers.attention.sharding import check_not_sharded
from performers.models import PerformerConfig
from performers.models.context import AttentionContext

# The place of what fills up rows; its distance to any token is still an integer.
FAR = torch.iinfo(torch.int64).max // 2

# Narrower blocks would spend more on calls than on products.
_LEAST_BLOCK = 16


class SequenceRows:
    """The sequences of a call, one to a row, without masked tokens and padded on the right.

    Attributes:
        context: The call; masks and sequences are those of the rows.
        is_causal: Whether later tokens are hidden.
        layer: Index of the layer.
        real: True where a row has a token, ``(N, longest)``.
        lengths: Tokens of each sequence, ``(N,)``.
        places: The place of each token in its row of the call, ``(N, longest)``; far away
            where there is none.
        ranks: The place of each token in its sequence, ``(N, longest)``; far away where there is
            none.
    """

    def __init__(
        self, context: AttentionContext, layer: int, shape: tuple[int, int], device: torch.device
    ) -> None:
        self.context, self.is_causal, self.layer = context, context.is_causal, layer
        batch, length = shape
        self._shape = shape
        # Without masks and packed rows the sequences are the rows.
        self._whole = context.key_mask is None and context.sequence_ids is None
        if self._whole:
            self.lengths = torch.full((batch if length else 0,), length, device=device)
            self.real = torch.ones(shape, dtype=torch.bool, device=device)
            self.ranks = self.places = torch.arange(length, device=device).expand(batch, -1)
            return
        sequence = torch.arange(batch, device=device)[:, None].expand(-1, length)
        if context.sequence_ids is not None:
            sequence = sequence * (length + 1) + context.sequence_ids
        self._tokens = torch.arange(batch * length, device=device)
        if context.key_mask is not None:
            self._tokens = context.key_mask.flatten().nonzero()[:, 0]
        _, self.lengths = sequence.flatten()[self._tokens].unique_consecutive(return_counts=True)
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        ranks = torch.arange(longest, device=device)
        self.real = ranks < self.lengths[:, None]
        self.ranks = ranks.where(self.real, FAR)
        self._source = torch.zeros_like(self.real, dtype=torch.int64)
        self._source[self.real] = self._tokens
        self.places = (self._source % max(length, 1)).masked_fill(~self.real, FAR)

    def split(self, x: Tensor) -> Tensor:
        """``(B, H, L, width)`` as ``(N, H, longest, width)``, zeros where there is no token."""
        if self._whole:
            return x
        rows = x.transpose(1, 2).flatten(0, 1)[self._source].transpose(1, 2)
        return rows.masked_fill(~self.real[:, None, :, None], 0)

    def join(self, rows: Tensor) -> Tensor:
        """``(N, H, longest, width)`` as ``(B, H, L, width)``, zeros for masked tokens."""
        if self._whole:
            return rows
        tokens = rows.transpose(1, 2)[self.real]
        out = tokens.new_zeros(self._shape[0] * self._shape[1], *tokens.shape[1:])
        return out.index_copy(0, self._tokens, tokens).unflatten(0, self._shape).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(Options):
    """Options of a mechanism, ``attention_options`` of a configuration."""

    @classmethod
    def flag(cls, name: str) -> str:
        """The name itself: errors are those of the configuration."""
        return name

    def completed(self, longest: int) -> AttentionOptions:
        """The options with numbers in the place of None, by the longest input.

        Chosen when a mechanism is built: a choice that is kept in the configuration would stay when
        the longest input changes.
        """
        return self


class Comparator(nn.Module):
    """A mechanism that computes on sequences, one to a row; subclasses implement ``attend``.

    Args:
        options: Its options, completed.
        config: Configuration of the model.
        generator: Source of randomness; torch's default generator when None.
    """

    def __init__(self, options: Any, config: PerformerConfig, generator: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        """The options, for printing."""
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self.options).items())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """Attention within each row, ``(N, H, longest, width)`` as the values are.

        Queries, keys and values are zero behind a sequence, where the output may be anything.
        """
        raise NotImplementedError

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; all of shape ``(B, H, L, head_dim)``, the matrix ``(B, H, L, L)`` or None.

        The matrix is what multiplies the values: the output for the identity in their place.
        """
        check_not_sharded(type(self).__name__)
        batch, heads, length, _ = query.shape
        rows = SequenceRows(context, layer, (batch, length), query.device)

        def run(value: Tensor) -> Tensor:
            if not len(rows.lengths):
                return torch.zeros_like(value)
            parts = [rows.split(x) for x in (query, key, value)]
            return rows.join(self.attend(parts[0], parts[1], parts[2], rows))

        if not context.need_weights:
            return run(value), None
        identity = torch.eye(length, dtype=value.dtype, device=value.device)
        return run(value), run(identity.expand(batch, heads, -1, -1))


def split_blocks(x: Tensor, size: int, fill: float = 0) -> Tensor:
    """Cut ``(..., L, width)`` into blocks ``(..., ceil(L / size), size, width)``."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size), value=fill).unflatten(-2, (-1, size))


def with_neighbours(blocks: Tensor, after: int, fill: float = 0) -> Tensor:
    """Each block behind the one before it and, where ``after`` is 1, before the one after it.

    ``(..., N, size, width)`` becomes ``(..., N, (2 + after) * size, width)``.
    """
    count = blocks.shape[-3]
    padded = F.pad(blocks, (0, 0, 0, 0, 1, after), value=fill)
    return torch.cat([padded.narrow(-3, i, count) for i in range(2 + after)], dim=-2)


def distances(places: Tensor, size: int, after: int) -> Tensor:
    """Places of a block's tokens less those of its neighbours' tokens.

    ``(..., L)`` becomes ``(..., ceil(L / size), size, (2 + after) * size)``.
    """
    far = torch.iinfo(places.dtype).max // 2
    blocks = split_blocks(places.unsqueeze(-1), size, far)
    return blocks - with_neighbours(blocks, after, far).mT


def attend_allowed(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention to the allowed keys; zeros for a query that has none.

    ``allowed`` is boolean and broadcastable to ``(N, H, L, S)``.
    """
    blind = ~allowed.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed | blind)
    return out.masked_fill(blind, 0.0)


def attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    window: int,
    *,
    is_causal: bool,
    spacing: int = 1,
    first: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention to the keys whose places are at most ``window * spacing`` away.

    ``O(L * window)``: blocks of at least ``window`` tokens attend to themselves and to the blocks
    next to them, and a mask cuts out the window.

    Args:
        query: Shape ``(N, H, L, head_dim)``, as are keys.
        key: Keys.
        value: Shape ``(N, H, L, width)``.
        places: Rising numbers, ``(N, L)``.
        window: Tokens to each side.
        is_causal: Whether later tokens are hidden.
        spacing: Least difference between the places of two tokens.
        first: Keys, values and places, ``(N, E)``, of tokens that all see: those with places
            below ``E``, which the window leaves out; far away where there is none.
    """
    size, after = max(window, _LEAST_BLOCK), 0 if is_causal else 1
    queries = split_blocks(query, size)
    keys, values = (with_neighbours(split_blocks(x, size), after) for x in (key, value))
    distance = distances(places, size, after)
    allowed = distance.abs() <= window * spacing
    if is_causal:
        allowed &= distance >= 0
    if first is not None:
        more_keys, more_values, more = first
        own = split_blocks(places.unsqueeze(-1), size, FAR)
        seen = (more < FAR)[:, None, None].expand(-1, *own.shape[1:3], -1)
        if is_causal:
            seen = seen & (more[:, None, None] <= own)
        known = with_neighbours(own, after, FAR).mT < more.shape[1]
        allowed = torch.cat((allowed & ~known, seen), dim=-1)
        count = queries.shape[2]
        keys, values = (
            torch.cat((x, y.unsqueeze(2).expand(-1, -1, count, -1, -1)), dim=3)
            for x, y in ((keys, more_keys), (values, more_values))
        )
    # One row of blocks after the other, so that heads share a block's mask.
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (queries, keys, values))
    out = attend_allowed(queries, keys, values, allowed.flatten(0, 1).unsqueeze(1))
    out = out.unflatten(0, (len(query), -1)).transpose(1, 2).flatten(2, 3)
    return out[:, :, : query.shape[2]]


def take_columns(x: Tensor, step: int, fill: float = 0) -> Tensor:
    """Every ``step``-th token: ``(N, H, L, width)`` as ``(N * step, H, ceil(L / step), width)``."""
    return split_blocks(x, step, fill).permute(0, 3, 1, 2, 4).flatten(0, 1)


def join_columns(x: Tensor, step: int, length: int) -> Tensor:
    """The inverse of `take_columns`, cut to ``length`` tokens."""
    return x.unflatten(0, (-1, step)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, :length]
