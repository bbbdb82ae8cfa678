"""The attention mechanisms that a configuration can name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from performers.models.configuration import PerformerConfig

Builder = Callable[["PerformerConfig", torch.Generator | None], nn.Module]


@dataclass(frozen=True)
class AttentionEntry:
    """A registered mechanism; see `register_attention` for the fields."""

    build: Builder
    cache: type[DynamicLayer] | None
    shares_query: bool
    not_causal: str | None

    def check_causal(self, name: str, is_decoder: bool) -> None:
        """Refuse a causal model with an attention that has no causal form."""
        if is_decoder and self.not_causal is not None:
            raise ValueError(
                f"attention={name!r} has no causal form, because {self.not_causal}: use "
                "is_decoder=False, or another attention"
            )


ATTENTIONS: dict[str, AttentionEntry] = {}
"""Registered mechanisms by the names that ``PerformerConfig.attention`` can have."""


def register_attention(
    name: str,
    build: Builder,
    *,
    cache: type[DynamicLayer] | None = None,
    shares_query: bool = False,
    not_causal: str | None = None,
) -> None:
    """Add an attention mechanism that Performer models can be built with.

    The mechanism is a module that is called with queries, keys and values of shape
    ``(B, H, L, head_dim)``, an ``AttentionContext`` and the index of its layer, and returns the
    output, shaped like the values, and the attention matrix ``(B, H, L, S)`` or None.

    Args:
        name: The value of ``PerformerConfig.attention`` that selects it.
        build: From a configuration and a generator (None: torch's own) to the mechanism of one
            layer.
        cache: Class of the cache layers that hold its past in generation; None: it has no cache,
            and ``generate`` reads the whole row again for each token.
        shares_query: Queries are the keys, too: projections have two parts and not three.
        not_causal: Reason why it has no causal form, in words; None: it has one.

    Raises:
        ValueError: The name is taken.

    Example:
        >>> from performers.models import PerformerConfig, PerformerModel, register_attention
        >>> class Mean(torch.nn.Module):
        ...     def forward(self, query, key, value, context, layer):
        ...         return value.mean(2, keepdim=True).expand_as(value), None
        >>> register_attention("mean", lambda config, generator: Mean(), not_causal="it averages")
        >>> model = PerformerModel(PerformerConfig(attention="mean"))
    """
    if name in ATTENTIONS:
        raise ValueError(f"attention {name!r} is registered already: choose another name")
    ATTENTIONS[name] = AttentionEntry(build, cache, shares_query, not_causal)
