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

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from performers.app.options import OptionError, Options, option
from performers.attention import ListedKeys
from performers.features import SoftmaxFeatures
from performers.models import PerformerConfig, register_attention
from performers.models.attention import FavorMechanism
from studies.comparators.bigbird import BigBirdMechanism
from studies.comparators.linformer import LinformerMechanism
from studies.comparators.local import LocalMechanism
from studies.comparators.longformer import LongformerMechanism
from studies.comparators.lsh import HashFeatures, LshMechanism
from studies.comparators.routing import RoutingMechanism
from studies.comparators.sparse import PATTERNS, Pattern, SparseMechanism

COMPARATORS = ("lsh", "routing", "linformer", "local", "longformer", "bigbird", "sparse")

# What no options stand for is resolved when a mechanism is built: a choice that is kept would stay
# when the longest input changes.
_LINFORMER_RANK = 256


class AttentionOptions(Options):
    """Options of a mechanism, ``attention_options`` of a configuration."""

    @classmethod
    def flag(cls, name: str) -> str:
        """The name itself: errors are those of the configuration."""
        return name


@dataclass(frozen=True, kw_only=True)
class LinformerOptions(AttentionOptions):
    """Options of ``linformer``."""

    rank: int | None = option(
        "Keys and values that a sequence is projected to; None is 256, or "
        "max_position_embeddings where that is less.",
        None,
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class LshOptions(AttentionOptions):
    """Options of ``lsh``."""

    buckets: int | None = option(
        "Buckets, even or 1; None is the least power of two with chunk_size tokens a bucket or "
        "fewer at max_position_embeddings. The number does not depend on the input, so that a "
        "token sees the same however long the row becomes.",
        None,
        at_least=1,
    )
    chunk_size: int = option(
        "Tokens seen to each side, among those of a token's bucket.", 64, at_least=1
    )
    rounds: int = option("Hashes, the union of whose buckets is attended to.", 4, at_least=1)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.buckets is not None and self.buckets > 1 and self.buckets % 2:
            raise OptionError(f"buckets must be even, or 1, got {self.buckets}")


@dataclass(frozen=True, kw_only=True)
class LocalOptions(AttentionOptions):
    """Options of ``local``."""

    window: int = option("Tokens seen to each side.", 128, at_least=0)


@dataclass(frozen=True, kw_only=True)
class BigBirdOptions(AttentionOptions):
    """Options of ``bigbird``."""

    block_size: int = option("Tokens in a block.", 64, at_least=1)
    global_blocks: int = option(
        "First blocks of a sequence that see all and that all see.", 2, at_least=0
    )
    random_blocks: int = option("Random blocks that each block sees.", 3, at_least=0)


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


@dataclass(frozen=True, kw_only=True)
class LongformerOptions(AttentionOptions):
    """Options of ``longformer``."""

    window: int = option("Tokens seen to each side.", 128, at_least=0)
    dilation: int = option("Difference between the places of two of them.", 1, at_least=1)
    global_tokens: int = option(
        "First tokens of a sequence that all see and that see all.", 1, at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class RoutingOptions(AttentionOptions):
    """Options of ``routing``."""

    clusters: int | None = option(
        "Centroids of a head; None is the square root of max_position_embeddings, rounded up.",
        None,
        at_least=1,
    )
    window: int = option("Tokens of a cluster seen to each side.", 128, at_least=1)
    decay: float = option(
        "What is left of a centroid after a step of training.", 0.999, at_least=0, at_most=1
    )


@dataclass(frozen=True, kw_only=True)
class ListedOptions(AttentionOptions):
    """Options of ``favor-listed``."""

    window: int | None = option("Tokens seen exactly to each side.", None, at_least=0)
    keys: int = option("Keys a query meets by content; none are listed at 0.", 64, at_least=0)
    lists: int = option("Lists of keys of a head.", 8, at_least=1)
    refresh: int = option("Positions between new lists in causal attention.", 16, at_least=1)
    per_head: bool = option("Draw features for each head.", True)
    learned: bool = option("Train the projection, a separate one for each head.", False)


def _linformer(config: PerformerConfig, options: Any, generator: Any) -> LinformerMechanism:
    longest = config.max_position_embeddings
    return LinformerMechanism(options.rank or min(_LINFORMER_RANK, longest), longest)


def _sparse(config: PerformerConfig, options: Any, generator: Any) -> SparseMechanism:
    stride = options.stride or max(_root(config.max_position_embeddings), options.summary)
    return SparseMechanism(stride, options.pattern, options.summary)


def _lsh(config: PerformerConfig, options: Any, generator: Any) -> LshMechanism:
    # The least power of two, at least 2, of buckets with ``chunk_size`` tokens or fewer each.
    chunks = -(-config.max_position_embeddings // options.chunk_size)
    hashes = HashFeatures(
        config.head_dim,
        options.buckets or 2 ** max(1, (chunks - 1).bit_length()),
        options.rounds,
        num_heads=config.projected_heads,
        generator=generator,
    )
    return LshMechanism(hashes, options.chunk_size)


def _routing(config: PerformerConfig, options: Any, generator: Any) -> RoutingMechanism:
    clusters = options.clusters or _root(config.max_position_embeddings)
    shape = (config.num_attention_heads, config.head_dim, clusters)
    return RoutingMechanism(*shape, options.window, options.decay, generator)


def _listed(config: PerformerConfig, options: Any, generator: Any) -> FavorMechanism:
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


def _root(longest: int) -> int:
    return math.isqrt(longest - 1) + 1


def _register(
    name: str, options: type[AttentionOptions], build: Callable[..., nn.Module], **more: Any
) -> None:
    def built(config: PerformerConfig, generator: torch.Generator | None) -> nn.Module:
        given = options(**config.attention_options)
        if isinstance(build, type):
            return build(**asdict(given))
        return build(config, given, generator)

    register_attention(name, built, options=options, **more)


_register("local", LocalOptions, LocalMechanism)
_register("bigbird", BigBirdOptions, BigBirdMechanism)
_register("longformer", LongformerOptions, LongformerMechanism)
_register("sparse", SparseOptions, _sparse)
_register("lsh", LshOptions, _lsh, shares_query=True)
_register("routing", RoutingOptions, _routing, shares_query=True)
_register("favor-listed", ListedOptions, _listed)
_register(
    "linformer",
    LinformerOptions,
    _linformer,
    fixed_length=True,
    not_causal="its projected keys mix all positions",
)
