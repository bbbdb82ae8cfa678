"""Attention maps of a converted model, for ``output_attentions``; quadratic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

from performers.convert.interface.call import AttentionCall
from performers.nn import FavorAttention

__all__ = ["exact_weights", "linear_weights", "weights_wanted"]


def weights_wanted(options: Mapping[str, Any]) -> bool:
    """Whether somebody asks for the matrix of weights."""
    if options.get("output_attentions"):
        return True
    # Most models record what their modules return, and do not hand the option down to them.
    collected = _active_collector.get() or {}
    return any(name.endswith("attentions") for name in collected)


def linear_weights(block: FavorAttention, call: AttentionCall) -> Tensor:
    """The matrix (B, H, L, S) that linear attention implies."""
    if call.cache_layer is not None or call.pattern.sequence_ids is not None:
        raise ValueError(
            "output_attentions is not available with a cache or packed sequences; pass "
            "use_cache=False and one sequence in a row"
        )
    return block.weights(
        call.query,
        call.key,
        is_causal=call.pattern.is_causal,
        key_mask=call.pattern.key_mask,
        scale=call.scale,
    )


def exact_weights(call: AttentionCall) -> Tensor:
    """The matrix (B, H, L, S) of an exact layer."""
    pattern, length, size = call.pattern, call.query.shape[2], call.key.shape[2]
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    scores = call.scale * (call.query @ key.transpose(-1, -2)).float()
    mask = call.dense_mask()
    if mask is None and pattern.is_causal:
        # Aligned at the last key, where a cache brings more keys than there are queries.
        mask = scores.new_ones(length, size, dtype=torch.bool).tril(size - length)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(call.query.dtype)
