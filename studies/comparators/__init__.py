"""Efficient attentions to compare with: importing this package registers them for models.

``PerformerConfig(attention="linformer", attention_options={"rank": 64})`` and so on: ``linformer``,
``lsh`` (Reformer), ``routing``, ``local`` (a sliding window), ``longformer``, ``bigbird`` and
``sparse`` (the Sparse Transformer). Each takes any queries, keys and values, masks and packed rows,
and forms no L×L matrix unless one is asked for. All are dense attention on rearranged tokens and
run wherever torch does. They are written here because the implementations in transformers own their
projections and pad to whole blocks, and none handles packed rows: Reformer's chunks and BigBird's
random blocks depend on later tokens or on the training mode, Longformer's window has no causal
form. ``favor-listed`` is FAVOR with exact keys that configurations have no fields for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from performers.app.options import option
from performers.attention import ListedKeys
from performers.features import SoftmaxFeatures
from performers.models import PerformerConfig, register_attention
from performers.models.attention import FavorMechanism
from studies.comparators.bigbird import BigBirdMechanism, BigBirdOptions
from studies.comparators.blocks import AttentionOptions
from studies.comparators.linformer import LinformerMechanism, LinformerOptions
from studies.comparators.lsh import LshMechanism, LshOptions
from studies.comparators.routing import RoutingMechanism, RoutingOptions
from studies.comparators.sparse import SparseMechanism, SparseOptions
from studies.comparators.windows import (
    LocalMechanism,
    LocalOptions,
    LongformerMechanism,
    LongformerOptions,
)

COMPARATORS = ("lsh", "routing", "linformer", "local", "longformer", "bigbird", "sparse")


@dataclass(frozen=True, kw_only=True)
class ListedOptions(AttentionOptions):
    """Options of ``favor-listed``."""

    window: int | None = option("Tokens seen exactly to each side.", None, at_least=0)
    keys: int = option("Keys a query meets by content; none are listed at 0.", 64, at_least=0)
    lists: int = option("Lists of keys of a head.", 8, at_least=1)
    refresh: int = option("Positions between new lists in causal attention.", 16, at_least=1)
    per_head: bool = option("Draw features for each head.", True)
    learned: bool = option("Train the projection, a separate one for each head.", False)


def _listed(options: ListedOptions, config: PerformerConfig, generator: Any) -> FavorMechanism:
    size, heads = config.head_dim, config.num_attention_heads
    own = {"num_heads": heads if options.per_head else None, "generator": generator}
    features, listed = SoftmaxFeatures(size, config.num_features, **own), None
    if options.keys:
        own = {"num_heads": heads, "refresh": options.refresh, "generator": generator}
        listed = ListedKeys(size, options.lists, options.keys, **own)
    mechanism = FavorMechanism(features, window=options.window, listed_keys=listed)
    if options.learned:
        mechanism.learn_(heads)
    return mechanism


def _register(
    name: str, options: type[AttentionOptions], build: Callable[..., nn.Module], **more: Any
) -> None:
    def built(config: PerformerConfig, generator: torch.Generator | None) -> nn.Module:
        chosen = options(**config.attention_options)
        return build(chosen.completed(config.max_position_embeddings), config, generator)

    register_attention(name, built, options=options, **more)


_register("local", LocalOptions, LocalMechanism)
_register("longformer", LongformerOptions, LongformerMechanism)
_register("bigbird", BigBirdOptions, BigBirdMechanism)
_register("sparse", SparseOptions, SparseMechanism)
_register("lsh", LshOptions, LshMechanism, shares_query=True)
_register("routing", RoutingOptions, RoutingMechanism, shares_query=True)
_register(
    "linformer",
    LinformerOptions,
    LinformerMechanism,
    fixed_length=True,
    not_causal="its projected keys mix all positions",
)
_register("favor-listed", ListedOptions, _listed)
