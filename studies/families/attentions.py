"""Linear attention for rows of relatives, registered for the models by import."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from performers.attention import ListedKeys
from performers.features import SoftmaxFeatures
from performers.models import PerformerConfig, register_attention
from performers.models.attention import FavorMechanism
from performers.models.context import AttentionContext

NAME = "favor-relatives"


@dataclass(frozen=True)
class RelativesOptions:
    """Options of ``attention="favor-relatives"``.

    Attributes:
        window: Tokens seen exactly to each side.
        learned: Train the projection, a separate one for each head.
        listed_keys: Keys listed by content for a query, of the whole row; 0 for none.
        positions_window: Tokens seen exactly to each side by half of the heads in a row that is
            sorted by position: those at neighbouring positions of all members. None for no such
            heads.
    """

    window: int = 8
    learned: bool = False
    listed_keys: int = 0
    positions_window: int | None = None


class OrderedHeads(nn.Module):
    """Heads with a window in the row, and heads with a window in the row sorted by position.

    Attributes:
        near: Mechanism of the first half of the heads.
        across: That of the second half, on tokens in the order of their positions, and of the row
            among those at one position.
    """

    def __init__(self, near: FavorMechanism, across: FavorMechanism) -> None:
        super().__init__()
        self.near, self.across = near, across

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; all of shape ``(B, H, L, head_dim)``; no matrix is returned."""
        if context.rotary is None or context.cache is not None or context.is_causal:
            raise ValueError("positions_window needs a masked model with rotary positions")
        half = query.shape[1] // 2
        first = (x[:, :half] for x in (query, key, value))
        out, _ = self.near(*first, context, layer)
        order = positions(context.rotary).argsort(dim=-1, stable=True)
        places = order[:, None, :, None].expand(-1, half, -1, query.shape[-1])
        second = (x[:, half:].gather(2, places) for x in (query, key, value))
        mask = context.key_mask
        mask = None if mask is None else mask.gather(1, order)
        found, _ = self.across(*second, context._replace(key_mask=mask), layer)
        return torch.cat((out, torch.empty_like(found).scatter(2, places, found)), dim=1), None


def positions(rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Numbers ``(B, L)`` that rise with the positions of rotary angles, up to thousands."""
    cosine, sine = (x[:, 0, :, -1] for x in rotary)
    return torch.atan2(sine, cosine)


def _build(config: PerformerConfig, generator: torch.Generator | None) -> nn.Module:
    options = RelativesOptions(**config.attention_options)
    heads = config.num_attention_heads
    if options.positions_window is None:
        return _mechanism(config, options, heads, options.window, generator)
    half = heads // 2
    near = _mechanism(config, options, half, options.window, generator)
    across = _mechanism(config, options, heads - half, options.positions_window, generator)
    return OrderedHeads(near, across)


def _mechanism(
    config: PerformerConfig,
    options: RelativesOptions,
    heads: int,
    window: int,
    generator: torch.Generator | None,
) -> FavorMechanism:
    size = config.head_dim
    features = SoftmaxFeatures(size, config.num_features, generator=generator)
    listed = None
    if options.listed_keys:
        listed = ListedKeys(size, 16, options.listed_keys, num_heads=heads, generator=generator)
    made = FavorMechanism(features, window=window, listed_keys=listed)
    if options.learned:
        made.learn_(heads)
    return made


register_attention(NAME, _build, options=RelativesOptions)
