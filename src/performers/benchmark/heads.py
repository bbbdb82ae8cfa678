"""Queries, keys and values of the attention layers of a pretrained model.

Random inputs say little about how well attention is approximated: trained heads have long queries
and keys, a few keys that everybody attends to, and rotary positions. `capture_heads` returns what a
model's attention layers receive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from performers.benchmark.replacement import exact_attention, replace_attention
from performers.convert.distillation.pretrained import LoadedModel
from performers.planning.samples import Samples

__all__ = ["HeadSample", "capture_heads"]


@dataclass(frozen=True)
class HeadSample(Samples):
    """Inputs of one attention layer, after projections and rotary positions.

    Attributes:
        layer: The layer's index.
    """

    layer: int


def capture_heads(
    loaded: LoadedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    layers: Iterable[int] | None = None,
) -> list[HeadSample]:
    """Run a model once and keep what its attention layers receive.

    Args:
        loaded: The model.
        input_ids: Token ids (B, L).
        attention_mask: (B, L), nonzero where a token takes part; None: all do.
        layers: Indices of the layers to keep; None: all.

    Returns:
        One sample a layer, in the order of the layers, contiguous and without gradients.

    Raises:
        ValueError: The inputs do not fit the model, a layer is not there, or the model's attention
            is not softmax attention under a causal or key-padding mask.
    """
    wanted = None if layers is None else set(layers)
    samples: dict[int, HeadSample | None] = {}

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        if layer in samples:
            raise ValueError(
                f"layer {layer} of {type(loaded.model).__name__} attends more than once in a "
                "forward pass; only self-attention can be captured"
            )
        samples[layer] = None
        if wanted is None or layer in wanted:
            query, key, value = (x.detach().contiguous() for x in (query, key, value))
            samples[layer] = HeadSample(query, key, value, layer=layer, **rest)
        return exact_attention(layer, query, key, value, **rest)

    with torch.no_grad(), replace_attention(loaded.model, keep):
        loaded.model(**loaded.inputs(input_ids, attention_mask))
    if wanted is not None and not (wanted and wanted <= set(samples)):
        raise ValueError(
            f"layers must be some of the model's attention layers {sorted(samples)}, "
            f"got {sorted(wanted)}"
        )
    return [sample for _, sample in sorted(samples.items()) if sample is not None]
