"""The attention mechanisms that a configuration can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from performers.models.configuration import PerformerConfig

Builder = Callable[["PerformerConfig", torch.Generator | None], nn.Module]


@dataclass(frozen=True)
class AttentionEntry:
    """A registered mechanism; see `register_attention` for the fields."""

    name: str
    build: Builder
    options: type | None
    cache: type[DynamicLayer] | None
    shares_query: bool
    fixed_length: bool
    not_causal: str | None

    def check_causal(self, is_decoder: bool) -> None:
        """Refuse a causal model with an attention that has no causal form."""
        if is_decoder and self.not_causal is not None:
            raise ValueError(
                f"attention={self.name!r} has no causal form, because {self.not_causal}: use "
                "is_decoder=False, or another attention"
            )

    def complete_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check options and add the defaults of missing ones.

        What is None of other mechanisms, in the configuration of a model that is loaded with
        another attention, is left out.
        """
        known = [] if self.options is None else [field.name for field in fields(self.options)]
        given = {name: value for name, value in given.items() if name in known or value is not None}
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(
                f"attention_options of attention={self.name!r} are {', '.join(known) or 'none'}, "
                f"got {', '.join(unknown)}: leave out the others"
            )
        if self.options is None:
            return {}
        try:
            return asdict(self.options(**given))
        except (TypeError, ValueError) as error:
            raise ValueError(f"attention_options of attention={self.name!r}: {error}") from error


ATTENTIONS: dict[str, AttentionEntry] = {}
"""Registered mechanisms by the names that ``PerformerConfig.attention`` can have."""


def register_attention(
    name: str,
    build: Builder,
    *,
    options: type | None = None,
    cache: type[DynamicLayer] | None = None,
    shares_query: bool = False,
    fixed_length: bool = False,
    not_causal: str | None = None,
) -> None:
    """Add an attention mechanism that Performer models can be built with.

    The mechanism is a module that is called with queries, keys and values of shape
    ``(B, H, L, head_dim)``, an ``AttentionContext`` and the index of its layer, and returns the
    output, shaped like the values, and the attention matrix ``(B, H, L, S)`` or None. Parameters
    of a mechanism are initialised by its ``reset_parameters()``, also where a saved model lacks
    them.

    Args:
        name: The value of ``PerformerConfig.attention`` that selects it.
        build: Function of a configuration and a generator (None: the default one) that returns the
            mechanism of one layer; its options are ``config.attention_options``.
        options: Dataclass of the options that ``PerformerConfig.attention_options`` may have, each
            with a default that JSON can hold; it raises ValueError for values out of range. None:
            there are no options.
        cache: Class of the cache layers in generation; None: there is no cache, and ``generate``
            reads the whole row again for each token.
        shares_query: Queries serve as keys: projections have two parts and not three.
        fixed_length: ``max_position_embeddings`` limits the length of a sequence.
        not_causal: Reason why there is no causal form; None: there is one.

    Raises:
        ValueError: The name is registered already.

    Example:
        >>> from dataclasses import dataclass
        >>> from performers.models import PerformerConfig, PerformerModel, register_attention
        >>> @dataclass
        ... class PoolOptions:
        ...     stride: int = 4
        >>> class Pool(torch.nn.Module):
        ...     def __init__(self, stride):
        ...         super().__init__()
        ...         self.stride = stride
        ...     def forward(self, query, key, value, context, layer):
        ...         return value[:, :, :: self.stride].mean(2, keepdim=True).expand_as(value), None
        >>> register_attention(
        ...     "pool",
        ...     lambda config, generator: Pool(**config.attention_options),
        ...     options=PoolOptions,
        ...     not_causal="it averages over the whole sequence",
        ... )
        >>> config = PerformerConfig(attention="pool", attention_options={"stride": 2})
        >>> model = PerformerModel(config)
    """
    if name in ATTENTIONS:
        raise ValueError(f"attention {name!r} is registered already: choose another name")
    ATTENTIONS[name] = AttentionEntry(
        name, build, options, cache, shares_query, fixed_length, not_causal
    )
