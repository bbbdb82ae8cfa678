"""Efficient attentions to compare with: importing this package registers them for models.

``PerformerConfig(attention="linformer", attention_options={"rank": 64})`` and so on: ``linformer``,
``lsh`` (Reformer), ``local`` (a sliding window) and ``bigbird``. Each takes any queries, keys and
values, masks and packed rows, and forms no L×L matrix unless one is asked for. They are written
here because the implementations in transformers own their projections and pad to whole blocks, and
none handles packed rows: Reformer's chunks and BigBird's random blocks depend on later tokens or on
the training mode, Longformer's window has no causal form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from performers.models import PerformerConfig, register_attention
from studies.comparators.bigbird import BigBirdMechanism
from studies.comparators.linformer import LinformerMechanism
from studies.comparators.local import LocalMechanism
from studies.comparators.lsh import HashFeatures, LshMechanism

COMPARATORS = ("lsh", "linformer", "local", "bigbird")

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
