"""Efficient attentions to compare with: importing this package registers them for models.

``PerformerConfig(attention="linformer", attention_options={"rank": 64})`` and so on: ``linformer``,
``lsh`` (Reformer), ``routing``, ``local`` (a sliding window), ``longformer``, ``bigbird`` and
``sparse`` (the Sparse Transformer). Each takes any queries, keys and values, masks and packed rows,
and forms no L×L matrix unless one is asked for. All are dense attention on rearranged tokens and
run wherever torch does. They are written here because the implementations in transformers own their
projections and pad to whole blocks, and none handles packed rows: Reformer's chunks and BigBird's
random blocks depend on later tokens or on the training mode, Longformer's window has no causal
form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from performers.models import PerformerConfig, register_attention
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


@dataclass
class LinformerOptions:
    """Options of ``linformer``.

    Attributes:
        rank: Keys and values that a sequence is projected to; None is 256, or
            ``max_position_embeddings`` where that is less.
    """

    rank: int | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        _at_least(1, rank=self.rank)


@dataclass
class LshOptions:
    """Options of ``lsh``.

    Attributes:
        buckets: Buckets, even or 1; None is the least power of two with ``chunk_size`` tokens a
            bucket or fewer at ``max_position_embeddings``. The number does not depend on the input,
            so that a token sees the same however long the row becomes.
        chunk_size: Tokens seen to each side, among those of a token's bucket.
        rounds: Hashes, the union of whose buckets is attended to.
    """

    buckets: int | None = None
    chunk_size: int = 64
    rounds: int = 4

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(1, buckets=self.buckets, chunk_size=self.chunk_size, rounds=self.rounds)
        if self.buckets is not None and self.buckets > 1 and self.buckets % 2:
            raise ValueError(f"buckets must be even, or 1, got {self.buckets}")


@dataclass
class LocalOptions:
    """Options of ``local``.

    Attributes:
        window: Tokens seen to each side.
    """

    window: int = 128

    def __post_init__(self) -> None:
        """Check the range."""
        _at_least(0, window=self.window)


@dataclass
class BigBirdOptions:
    """Options of ``bigbird``.

    Attributes:
        block_size: Tokens in a block.
        global_blocks: First blocks of a sequence that see all and that all see.
        random_blocks: Random blocks that each block sees.
    """

    block_size: int = 64
    global_blocks: int = 2
    random_blocks: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(1, block_size=self.block_size)
        _at_least(0, global_blocks=self.global_blocks, random_blocks=self.random_blocks)


@dataclass
class SparseOptions:
    """Options of ``sparse``.

    Attributes:
        stride: Tokens of a block, and of the window; None is the square root of
            ``max_position_embeddings``, rounded up, or ``summary`` where that is more.
        pattern: ``"strided"`` or ``"fixed"``.
        summary: Last tokens of each block that the fixed pattern shows to all.
    """

    stride: int | None = None
    pattern: Pattern = "strided"
    summary: int = 8

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(1, stride=self.stride, summary=self.summary)
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {PATTERNS}, got {self.pattern!r}")
        if self.pattern == "fixed" and self.stride is not None and self.summary > self.stride:
            raise ValueError(
                f"summary must be at most the stride, {self.stride}, got {self.summary}"
            )


@dataclass
class LongformerOptions:
    """Options of ``longformer``.

    Attributes:
        window: Tokens seen to each side.
        dilation: Difference between the places of two of them.
        global_tokens: First tokens of a sequence that all see and that see all.
    """

    window: int = 128
    dilation: int = 1
    global_tokens: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(0, window=self.window, global_tokens=self.global_tokens)
        _at_least(1, dilation=self.dilation)


@dataclass
class RoutingOptions:
    """Options of ``routing``.

    Attributes:
        clusters: Centroids of a head; None is the square root of ``max_position_embeddings``,
            rounded up.
        window: Tokens of a cluster seen to each side.
        decay: What is left of a centroid after a step of training.
    """

    clusters: int | None = None
    window: int = 128
    decay: float = 0.999

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least(1, clusters=self.clusters, window=self.window)
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {self.decay}")


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _linformer(config: PerformerConfig, generator: torch.Generator | None) -> LinformerMechanism:
    longest = config.max_position_embeddings
    options = LinformerOptions(**config.attention_options)
    return LinformerMechanism(options.rank or min(_LINFORMER_RANK, longest), longest)


def _lsh(config: PerformerConfig, generator: torch.Generator | None) -> LshMechanism:
    options = LshOptions(**config.attention_options)
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


def _local(config: PerformerConfig, generator: torch.Generator | None) -> LocalMechanism:
    return LocalMechanism(LocalOptions(**config.attention_options).window)


def _bigbird(config: PerformerConfig, generator: torch.Generator | None) -> BigBirdMechanism:
    options = BigBirdOptions(**config.attention_options)
    return BigBirdMechanism(options.block_size, options.global_blocks, options.random_blocks)


def _sparse(config: PerformerConfig, generator: torch.Generator | None) -> SparseMechanism:
    options = SparseOptions(**config.attention_options)
    stride = options.stride or max(_root(config.max_position_embeddings), options.summary)
    return SparseMechanism(stride, options.pattern, options.summary)


def _longformer(config: PerformerConfig, generator: torch.Generator | None) -> LongformerMechanism:
    options = LongformerOptions(**config.attention_options)
    return LongformerMechanism(options.window, options.dilation, options.global_tokens)


def _routing(config: PerformerConfig, generator: torch.Generator | None) -> RoutingMechanism:
    options = RoutingOptions(**config.attention_options)
    return RoutingMechanism(
        config.num_attention_heads,
        config.head_dim,
        options.clusters or _root(config.max_position_embeddings),
        options.window,
        options.decay,
        generator,
    )


def _root(longest: int) -> int:
    return math.isqrt(longest - 1) + 1


register_attention(
    "linformer",
    _linformer,
    options=LinformerOptions,
    fixed_length=True,
    not_causal="its projected keys mix all positions",
)
register_attention("lsh", _lsh, options=LshOptions, shares_query=True)
register_attention("local", _local, options=LocalOptions)
register_attention("bigbird", _bigbird, options=BigBirdOptions)
register_attention("sparse", _sparse, options=SparseOptions)
register_attention("longformer", _longformer, options=LongformerOptions)
register_attention("routing", _routing, options=RoutingOptions, shares_query=True)
