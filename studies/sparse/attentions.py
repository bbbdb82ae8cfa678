"""The attentions that are compared, with equally many keys for a query."""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Setting:
    """An attention of `PerformerConfig`."""

    attention: str
    options: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    def configure(self, **fields: Any) -> PerformerConfig:
        """The configuration of a model; ``fields`` are the others."""
        return PerformerConfig(
            attention=self.attention, attention_options=self.options, **self.fields, **fields
        )

    def mechanism(
        self, num_heads: int, head_dim: int, length: int, *, is_causal: bool, layer: int = 0
    ) -> nn.Module:
        """The mechanism of one layer, drawn from torch's default generator."""
        config = self.configure(
            hidden_size=num_heads * head_dim,
            num_attention_heads=num_heads,
            max_position_embeddings=length,
            is_decoder=is_causal,
        )
        return build_mechanism(config, layer)


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
    features = {"num_features": max(keys // 2, 1)}
    return {
        EXACT: Setting("exact"),
        SOFTMAX: Setting("favor-softmax", fields={"num_features": keys}),
        WINDOW: Setting("favor-softmax", fields={**features, "window": max(side // 2, 1)}),
        RELU: Setting("favor-relu", fields={"num_features": keys}),
        LISTED: Setting(
            "favor-listed",
            {"keys": max(keys // 2, 1), "refresh": max(length // 32, 16)},
            features,
        ),
        STRIDED: Setting("sparse", {"stride": side}),
        FIXED: Setting("sparse", {"stride": keys, "pattern": "fixed", "summary": summary}),
        LONGFORMER: Setting("longformer", {"window": max(side - 1, 1), "global_tokens": 1}),
        ROUTING: Setting("routing", {"clusters": -(-length // keys), "window": side, "decay": 0.9}),
        REFORMER: Setting("lsh", {"chunk_size": max(side // 2, 1), "rounds": 2}),
        BIGBIRD: Setting(
            "bigbird",
            {"block_size": max(keys // blocks, 1), "global_blocks": 1, "random_blocks": 1},
        ),
        LOCAL: Setting("local", {"window": side}),
    }
