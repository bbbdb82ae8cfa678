"""Linear attention for rows of relatives, registered for the models by import."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from performers.attention import ListedKeys
from performers.features import SoftmaxFeatures
from performers.models import PerformerConfig, register_attention
from performers.models.attention import FavorMechanism

NAME = "favor-relatives"


@dataclass(frozen=True)
class RelativesOptions:
    """Options of ``attention="favor-relatives"``.

    Attributes:
        window: Tokens seen exactly to each side.
        learned: Train the projection, a separate one for each head.
        listed_keys: Keys listed by content for a query, of the whole row; 0 for none.
    """

    window: int = 8
    learned: bool = False
    listed_keys: int = 0


def _build(config: PerformerConfig, generator: torch.Generator | None) -> FavorMechanism:
    options, heads = RelativesOptions(**config.attention_options), config.num_attention_heads
    size = config.head_dim
    features = SoftmaxFeatures(size, config.num_features, generator=generator)
    listed = None
    if options.listed_keys:
        listed = ListedKeys(size, 16, options.listed_keys, num_heads=heads, generator=generator)
    made = FavorMechanism(features, window=options.window, listed_keys=listed)
    if options.learned:
        made.learn_(heads)
    return made


register_attention(NAME, _build, options=RelativesOptions)
