"""Attention calls of a transformers model, computed by exact and linear layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.output_capturing import _active_collector

from performers.attention.sharding import check_not_sharded
from performers.convert.interface.cache import ConvertedCacheLayer
from performers.convert.interface.masks import AttentionPattern
from performers.convert.options import LEAVE_EXACT
from performers.models.arguments import is_tracing
from performers.nn import FavorAttention

# Arguments of the attention interface that change the softmax or its scores.
_OTHER_ATTENTION = {
    "softcap": "soft-capping of the scores",
    "s_aux": "learned sink logits in the softmax",
    "sinks": "learned sink logits in the softmax",
    "position_bias": "a position bias on the scores",
    "indices": "keys chosen by an indexer",
    "block_indices": "blocks of keys chosen by an indexer",
    "cache": "a paged cache (continuous batching)",
}
# Those of them that torch's attention, which computes exact layers, would ignore.
_UNKNOWN_TO_TORCH = ("s_aux", "sinks", "indices", "block_indices")


@dataclass
class AttentionCall:
    """One call of a model's attention, after projections and rotary positions.

    ``query`` is ``(B, H, L, D)``, ``key`` ``(B, Hkv, S, D)`` and ``value`` ``(B, Hkv, S, Dv)``;
    Hkv divides H. ``cache_layer`` is the past of a linear layer, ``options`` are other arguments of
    the model.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    pattern: AttentionPattern
    dropout: float
    cache_layer: ConvertedCacheLayer | None
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Class of the module, for messages."""
        return type(self.module).__name__

    def favor_options(self) -> dict[str, Any]:
        """Options of ``favor_attention``."""
        return {
            "is_causal": self.pattern.is_causal,
            "key_mask": self.pattern.key_mask,
            "scale": self.scale,
        }


def exact_attention(call: AttentionCall) -> Tensor:
    """Compute softmax attention by torch, under any mask."""
    check_not_sharded(f"exact attention ({call.name})")
    for name in _UNKNOWN_TO_TORCH:
        if call.options.get(name) is not None:
            raise ValueError(
                f"{call.name} asks for {_OTHER_ATTENTION[name]}, which only the model's own "
                "attention can do: it cannot be converted, not even in part"
            )
    pattern, length = call.pattern, call.query.shape[2]
    window = pattern.window
    if (
        window is not None
        and pattern.unknown is None
        and pattern.sequence_ids is None
        and call.key.shape[2] == length > 4 * (window + 1)
        and not call.dropout
        and not any(call.options.get(name) is not None for name in _OTHER_ATTENTION)
    ):
        return _sliding_attention(call, window)
    out, _ = sdpa_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        pattern.dense(call.query.device),
        dropout=call.dropout,
        scaling=call.scale,
        is_causal=pattern.is_causal,
        **call.options,
    )
    return out.transpose(1, 2)


def linear_attention(block: FavorAttention, call: AttentionCall) -> Tensor:
    """Compute a call by the features and exact terms of a converted module."""
    check_linear(call)
    options: dict[str, Any] = {**call.favor_options(), "cu_seqlens": call.pattern.cu_seqlens}
    cache, length = call.cache_layer, call.query.shape[2]
    if cache is None:
        return block(call.query, call.key, call.value, **options)[0]
    if options["key_mask"] is not None:
        options["key_mask"] = options["key_mask"][:, -length:]
        if cache.state is None:
            cache.padding = (options["key_mask"].cumsum(-1) == 0).sum(-1)
    options |= {"state": cache.state, "return_state": True}
    out, state = block(call.query, call.key, call.value, **options)
    cache.set_state(state, length)
    return out


def check_linear(call: AttentionCall) -> None:
    """Refuse a call that linear attention cannot compute."""
    pattern, length, size = call.pattern, call.query.shape[2], call.key.shape[2]
    problem = _problem(call)
    if problem is not None:
        raise ValueError(
            f"{call.name} asks for {problem}, which linear attention cannot do: {LEAVE_EXACT}"
        )
    if pattern.is_causal and length != size:
        raise ValueError(
            f"{call.name} has {length} queries and {size} keys: causal attention needs as many "
            "keys as queries, and the past in the cache that the converted model made"
        )


def _problem(call: AttentionCall) -> str | None:
    """Name a request of a call that linear attention cannot fulfil; None: there is none."""
    pattern, cache, options = call.pattern, call.cache_layer, call.options
    asked = [text for name, text in _OTHER_ATTENTION.items() if options.get(name) is not None]
    if asked or pattern.unknown is not None:
        return asked[-1] if asked else pattern.unknown
    if call.dropout:
        return f"dropout of {call.dropout} on weights that are never formed"
    if pattern.window is not None and pattern.window < call.key.shape[2] - 1:
        return f"a sliding window of its own ({pattern.window})"
    if cache is not None and not pattern.is_causal:
        return "a cache in attention that is not causal"
    if cache is not None and pattern.sequence_ids is not None:
        return "a cache together with packed sequences"
    if cache is None and _continues(call):
        return (
            "a step that continues earlier tokens, whose cache did not reach its attention module "
            "under a name or type that performers knows"
        )
    boundaries = options.get("cu_seq_lens_q")
    if pattern.sequence_ids is None and boundaries is not None and len(boundaries) > 2:
        return "packed sequences without the position_ids that tell where each begins"
    return None


def _continues(call: AttentionCall) -> bool:
    """Return True if the mask or the positions of a causal call imply earlier tokens."""
    if not call.pattern.is_causal or is_tracing():
        return False
    if int(call.pattern.past) > 0:
        return True
    positions = call.options.get("position_ids")
    single = call.query.shape[2] == 1 == call.key.shape[2]
    return single and isinstance(positions, Tensor) and bool((positions > 0).any())


def weights_wanted(options: Mapping[str, Any]) -> bool:
    """Return True if the matrix of weights is requested."""
    if options.get("output_attentions"):
        return True
    # Most models record the outputs of their modules and do not pass the option down.
    collected = _active_collector.get() or {}
    return any(name.endswith("attentions") for name in collected)


def linear_weights(block: FavorAttention, call: AttentionCall) -> Tensor:
    """Compute the matrix (B, H, L, S) that linear attention implies."""
    if call.cache_layer is not None or call.pattern.sequence_ids is not None:
        raise ValueError(
            "output_attentions is not available with a cache or packed sequences; pass "
            "use_cache=False and one sequence in a row"
        )
    return block.weights(call.query, call.key, **call.favor_options())


def exact_weights(call: AttentionCall) -> Tensor:
    """Compute the matrix (B, H, L, S) of an exact layer: its attention to the unit vectors."""
    batch, heads, size, _ = call.key.shape
    units = torch.eye(size, dtype=call.value.dtype, device=call.value.device)
    return exact_attention(replace(call, value=units.expand(batch, heads, -1, -1), dropout=0.0))


def _sliding_attention(call: AttentionCall, window: int) -> Tensor:
    """Compute softmax over the keys with ``|i - j| <= window``; zeros where there are none.

    Blocks of queries meet the keys within their reach through ``scaled_dot_product_attention``:
    time and memory are linear in the length.
    """
    query, key, value = call.query, call.key, call.value
    batch, heads, length = query.shape[:3]
    block = max(1, min(length, max(window, 64)))
    count = -(-length // block)
    front, back = window, 0 if call.pattern.is_causal else window
    width = front + block + back
    fill = count * block - length

    if heads > key.shape[1]:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    # (B, N, H, block, D) against (B, N, H, width, D).
    blocks = F.pad(query, (0, 0, 0, fill)).unflatten(2, (count, block)).transpose(1, 2)
    keys, values = (
        F.pad(x, (0, 0, front, fill + back)).unfold(2, width, block).permute(0, 2, 1, 4, 3)
        for x in (key, value)
    )
    key_mask = call.pattern.key_mask
    if key_mask is None:
        key_mask = torch.ones(1, length, dtype=torch.bool, device=query.device)
    key_mask = F.pad(key_mask, (front, fill + back)).unfold(1, width, block)
    position = torch.arange(block, device=query.device).unsqueeze(-1) + front
    distance = torch.arange(width, device=query.device) - position
    seen = (distance >= -window) & (distance <= back)
    mask = (seen & key_mask.unsqueeze(-2)).unsqueeze(2)
    blind = ~mask.any(-1, keepdim=True)
    mask = (mask | blind).expand(batch, -1, -1, -1, -1)
    out = F.scaled_dot_product_attention(blocks, keys, values, attn_mask=mask, scale=call.scale)
    out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2).flatten(2, 3)[:, :, :length]
