"""A causal Performer over items, whose output layer is the catalogue."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from performers import PerformerAttention, SoftmaxFeatures


class CausalPerformer(nn.Module):
    """Queries for the next item of a sequence, and the items with their biases as coordinates.

    Embeddings are those of the output layer. The bias of an item is its last coordinate, and the
    last coordinate of a query is 1, so that a sampler knows of it.
    """

    def __init__(
        self,
        num_items: int,
        width: int,
        heads: int,
        layers: int,
        length: int,
        *,
        dropout: float = 0.0,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_items, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Queries ``(B, L, width)``, with a bias ``(B, L, width + 1)``, of sequences of items."""
        hidden = self.dropout(self.embedding(ids) + self.positions[: ids.shape[1]])
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden)
        if self.bias is None:
            return hidden
        return torch.cat((hidden, torch.ones_like(hidden[..., :1])), dim=-1)

    def items(self) -> Tensor:
        """Items of the output layer, shape ``(n, width)``, with a bias ``(n, width + 1)``."""
        if self.bias is None:
            return self.embedding.weight
        return torch.cat((self.embedding.weight, self.bias.unsqueeze(1)), dim=1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        features = SoftmaxFeatures(width // heads)
        self.attention = PerformerAttention(width, heads, batch_first=True, feature_map=features)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, normed, is_causal=True)[0])
        return x + self.dropout(self.feed_forward(self.norm(x)))
