"""A pointer network with linear attention: its outputs are positions of its input."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers.attention import FavorState
from performers.catalogue.loss import sampled_softmax_loss
from performers.catalogue.sampler import CatalogueSampler
from performers.features import SoftmaxFeatures
from performers.nn import FavorAttention

# Scores held at a time.
_SCORES = 1 << 24


class PerformerPointer(nn.Module):
    r"""Encoder, causal decoder and pointing over the encoder's outputs.

    The encoder reads ``N`` points with bidirectional FAVOR attention. The decoder reads the points
    chosen so far with causal FAVOR attention, whose state has a constant size, and the encoder's
    outputs with FAVOR attention. Each step then points by the exact softmax over the input::

        p(i | chosen) ∝ exp(x·e_i / √d),   i not chosen yet, or the end

    Random features would not do for that last softmax: their relative error is largest where it is
    sharp. Source: Vinyals, Fortunato and Jaitly 2015 (arXiv 1506.03134).

    Args:
        input_size: Numbers of a point.
        hidden_size: Width, a multiple of ``num_heads``.
        num_heads: Attention heads.
        encoder_layers: Layers of the encoder.
        decoder_layers: Layers of the decoder.
        num_features: Random features a head; None: about ``d ln d``.
        window: Exact attention of the encoder within this distance, as in ``favor_attention``; one
            that covers the input makes the encoder exact.
        ends: Whether a sequence ends by pointing at a learnt point after the input, number ``N``.
            Without, it has ``N`` steps.
        generator: Source of the projections.
    """

    def __init__(
        self,
        input_size: int,
        *,
        hidden_size: int = 128,
        num_heads: int = 8,
        encoder_layers: int = 3,
        decoder_layers: int = 2,
        num_features: int | None = None,
        window: int | None = None,
        ends: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}"
            )

        def attention(window: int | None = None) -> _Attention:
            features = SoftmaxFeatures(hidden_size // num_heads, num_features, generator=generator)
            return _Attention(hidden_size, num_heads, FavorAttention(features, window=window))

        self.embedding = nn.Linear(input_size, hidden_size)
        self.encoder = nn.ModuleList(
            _Block(hidden_size, attention(window)) for _ in range(encoder_layers)
        )
        self.encoder_norm = nn.LayerNorm(hidden_size)
        self.decoder = nn.ModuleList(
            _Block(hidden_size, attention(), attention()) for _ in range(decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_size)
        self.pointing = nn.Linear(hidden_size, hidden_size, bias=False)
        self.start = nn.Parameter(0.02 * torch.randn(hidden_size))
        self.end = nn.Parameter(0.02 * torch.randn(hidden_size)) if ends else None

    def encode(self, points: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Encoder outputs ``(B, N, hidden_size)``, the end after them as one more.

        Args:
            points: Shape ``(B, N, input_size)``.
            key_mask: Shape ``(B, N)``, True for points and False for padding.
        """
        hidden = self.embedding(points)
        for block in self.encoder:
            hidden = block(hidden, key_mask=key_mask)
        hidden = self.encoder_norm(hidden)
        if self.end is not None:
            hidden = torch.cat((hidden, self.end.expand(len(hidden), 1, -1)), dim=1)
        return hidden

    def loss(
        self,
        points: Tensor,
        target: Tensor,
        *,
        key_mask: Tensor | None = None,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Cross-entropy of the steps of a sequence, each after the right ones before it.

        Args:
            points: Shape ``(B, N, input_size)``.
            target: Numbers of the points in the order of the answer, shape ``(B, T)``; ``N`` is the
                end, and -100 pads.
            key_mask: Shape ``(B, N)``, True for points and False for padding.
            num_samples: Estimate the normaliser over the input from so many draws a step
                (`sampled_softmax_loss`) in place of all points; points chosen before then count in
                it. For inputs too long for ``T`` times ``N`` scores. Not with a ``key_mask``.
            generator: Source of the draws.

        Raises:
            ValueError: A target is out of range, or ``num_samples`` meets a ``key_mask``.
        """
        encoded = self.encode(points, key_mask)
        kept = target >= 0
        if bool((target >= encoded.shape[1]).any()):
            raise ValueError(
                f"target must be below {encoded.shape[1]}, the points"
                f"{' and the end' if self.end is not None else ''}; got {int(target.max())}"
            )
        memory, mask = self._memory(encoded, key_mask)
        hidden = self._inputs(encoded, target)
        for block in self.decoder:
            hidden = block(hidden, is_causal=True, memory=memory, memory_mask=key_mask)
        query = self.pointing(self.decoder_norm(hidden)) / math.sqrt(hidden.shape[-1])
        if num_samples is not None:
            if key_mask is not None:
                raise ValueError("num_samples is not available with a key_mask; pass one of them")
            losses = [
                sampled_softmax_loss(
                    query[row, keep],
                    encoded[row],
                    target[row, keep],
                    CatalogueSampler(encoded[row], generator=generator),
                    num_samples,
                    reduction="sum",
                    generator=generator,
                )
                for row, keep in enumerate(kept)
            ]
            return torch.stack(losses).sum() / kept.sum()
        # Step at which a point is chosen: it is hidden from later ones.
        steps = target.shape[1]
        chosen = torch.full(encoded.shape[:2], steps, device=target.device)
        order = torch.arange(steps, device=target.device).expand_as(target)
        chosen.scatter_(1, target.clamp_min(0), torch.where(kept, order, steps))
        total = query.new_zeros(())
        rows = max(1, _SCORES // encoded[..., 0].numel())
        for first in range(0, steps, rows):
            part = slice(first, first + rows)
            scores = query[:, part] @ encoded.mT
            hidden_points = chosen.unsqueeze(1) < order[:1, part].unsqueeze(-1)
            scores = scores.masked_fill(hidden_points | ~mask.unsqueeze(1), -math.inf)
            total = total + F.cross_entropy(
                scores.flatten(0, 1), target[:, part].flatten(), reduction="sum", ignore_index=-100
            )
        return total / kept.sum()

    @torch.no_grad()
    def decode(
        self, points: Tensor, *, key_mask: Tensor | None = None, max_steps: int | None = None
    ) -> Tensor:
        """Point greedily, never twice at one point.

        Args:
            points: Shape ``(B, N, input_size)``.
            key_mask: Shape ``(B, N)``, True for points and False for padding.
            max_steps: Most steps; by default until every point or the end has been chosen.

        Returns:
            Numbers of the points, shape ``(B, T)``, -100 after the end of a sequence. The end
            itself is not among them.
        """
        encoded = self.encode(points, key_mask)
        memory, free = self._memory(encoded, key_mask)
        free = free.clone()
        blocks = cast("list[_Block]", list(self.decoder))
        past = [block.remember(memory, key_mask) for block in blocks]
        states: list[FavorState | None] = [None] * len(blocks)
        size = points.shape[1]
        counts = free[:, :size].sum(1)
        ended = counts == 0
        inputs = self.start.expand(len(points), 1, -1)
        answer: list[Tensor] = []
        for step in range(min(max_steps or size, int(counts.max()))):
            hidden = inputs
            for layer, block in enumerate(blocks):
                hidden, states[layer] = block.step(hidden, states[layer], past[layer])
            query = self.pointing(self.decoder_norm(hidden))
            scores = (query @ encoded.mT).squeeze(1).masked_fill(~free, -math.inf)
            best = scores.argmax(-1)
            ended = ended | (best == size)
            answer.append(torch.where(ended, -100, best))
            free = free.scatter(1, best.unsqueeze(1), False)
            ended = ended | (counts <= step + 1)
            if bool(ended.all()):
                break
            inputs = encoded.gather(1, best.view(-1, 1, 1).expand(-1, 1, encoded.shape[-1]))
        return torch.stack(answer, dim=1) if answer else points.new_zeros(len(points), 0).long()

    def _memory(self, encoded: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encoder outputs of the points, and the mask of the places that can be pointed at."""
        mask = torch.ones(encoded.shape[:2], dtype=torch.bool, device=encoded.device)
        size = encoded.shape[1] - int(self.end is not None)
        if key_mask is not None:
            mask[:, :size] = key_mask
        return encoded[:, :size], mask

    def _inputs(self, encoded: Tensor, target: Tensor) -> Tensor:
        """Decoder inputs: the start, then the points of all steps but the last."""
        before = target[:, :-1].clamp_min(0).unsqueeze(-1).expand(-1, -1, encoded.shape[-1])
        start = self.start.expand(len(target), 1, -1)
        return torch.cat((start, encoded.gather(1, before)), dim=1)


class _Attention(nn.Module):
    """Projections around the attention of one layer."""

    def __init__(self, width: int, num_heads: int, favor: FavorAttention) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.favor = favor

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        state: FavorState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, FavorState | None]:
        out, state = self.favor(
            self._heads(self.query(x)),
            self._heads(self.key(memory)),
            self._heads(self.value(memory)),
            key_mask=key_mask,
            is_causal=is_causal,
            state=state,
            return_state=return_state,
        )
        return self.output(out.transpose(1, 2).flatten(2)), state

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class _Block(nn.Module):
    """Pre-norm block: attention, attention to a memory if there is one, feed-forward."""

    def __init__(self, width: int, own: _Attention, other: _Attention | None = None) -> None:
        super().__init__()
        self.own, self.other = own, other
        self.own_norm = nn.LayerNorm(width)
        self.other_norm = None if other is None else nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        normed = self.own_norm(x)
        x = x + self.own(normed, normed, key_mask=key_mask, is_causal=is_causal)[0]
        if self.other is not None and self.other_norm is not None:
            x = x + self.other(self.other_norm(x), memory, key_mask=memory_mask)[0]
        return x + self.feed_forward(x)

    def remember(self, memory: Tensor, key_mask: Tensor | None) -> FavorState:
        """The sums of the attention to a memory, for single steps."""
        assert self.other is not None
        _, state = self.other(
            torch.zeros_like(memory), memory, key_mask=key_mask, is_causal=True, return_state=True
        )
        assert state is not None
        return state

    def step(
        self, x: Tensor, state: FavorState | None, past: FavorState
    ) -> tuple[Tensor, FavorState | None]:
        """One position: the sums of the steps before and those of the memory."""
        assert self.other is not None
        assert self.other_norm is not None
        normed = self.own_norm(x)
        out, state = self.own(normed, normed, is_causal=True, state=state, return_state=True)
        x = x + out
        # The step's own key is masked: it reads the memory alone.
        hidden = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
        normed = self.other_norm(x)
        x = x + self.other(normed, normed, key_mask=hidden, is_causal=True, state=past)[0]
        return x + self.feed_forward(x), state
