"""The attentions that are compared, with equally many keys for a query."""

from __future__ import annotations

from typing import Any

from torch import nn

import studies.comparators  # noqa: F401  (registers them)
from performers.models import PerformerConfig
from performers.models.attention import build_mechanism

EXACT, LOCAL = "exact", "local"
SOFTMAX, WINDOW = "Performer, softmax", "Performer, features and window"
RELU, LISTED = "Performer, ReLU", "Performer, features and listed keys"
STRIDED, FIXED, LONGFORMER = (
    "Sparse Transformer, strided",
    "Sparse Transformer, fixed",
    "Longformer",
)
ROUTING, REFORMER, BIGBIRD = "Routing Transformer", "Reformer", "BigBird"
PERFORMERS = (SOFTMAX, WINDOW, RELU, LISTED)
PATTERNS = (STRIDED, FIXED, LONGFORMER, BIGBIRD, LOCAL)
BY_CONTENT = (ROUTING, REFORMER)
ALL = (EXACT, *PERFORMERS, *PATTERNS[:3], *BY_CONTENT, *PATTERNS[3:])


Setting = dict[str, Any]
"""Options of ``PerformerConfig``."""


def settings(length: int, keys: int, *, is_causal: bool) -> dict[str, Setting]:
    """The attentions by name, in which a query meets about ``keys`` keys or features.

    A window of the causal form has all of them before the query, the other one half on each side.
    Where two kinds of keys meet (features and a window, columns and a window, ...) each has its
    share; columns of the strided pattern are as many as follow from its window.
    """
    side = keys if is_causal else max(keys // 2, 1)
    # Blocks that BigBird's blocks see: own, neighbours, one global and one random.
    blocks = 4 if is_causal else 5
    summary = max(1, round(keys * keys / length))
    half = max(keys // 2, 1)
    return {
        EXACT: {"attention": "exact"},
        SOFTMAX: {"attention": "favor-softmax", "num_features": keys},
        WINDOW: {
            "attention": "favor-softmax",
            "num_features": half,
            "window": max(side // 2, 1),
        },
        RELU: {"attention": "favor-relu", "num_features": keys},
        LISTED: {
            "num_features": half,
            **_registered("favor-listed", keys=half, refresh=max(length // 32, 16)),
        },
        STRIDED: _registered("sparse", stride=side),
        FIXED: _registered("sparse", stride=keys, pattern="fixed", summary=summary),
        LONGFORMER: _registered("longformer", window=max(side - 1, 1), global_tokens=1),
        ROUTING: _registered("routing", clusters=-(-length // keys), window=side, decay=0.9),
        REFORMER: _registered("lsh", chunk_size=max(side // 2, 1), rounds=2),
        BIGBIRD: _registered(
            "bigbird", block_size=max(keys // blocks, 1), global_blocks=1, random_blocks=1
        ),
        LOCAL: _registered("local", window=side),
    }


def _registered(attention: str, **options: Any) -> Setting:
    return {"attention": attention, "attention_options": options}


def mechanism(
    setting: Setting, num_heads: int, head_dim: int, length: int, *, is_causal: bool, layer: int = 0
) -> nn.Module:
    """The mechanism of one layer, drawn from torch's default generator."""
    config = PerformerConfig(
        **setting,
        hidden_size=num_heads * head_dim,
        num_attention_heads=num_heads,
        max_position_embeddings=length,
        is_decoder=is_causal,
    )
    return build_mechanism(config, layer)
