"""Every attention layer of a transformers model computed by a function of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from performers.convert.interface.call import AttentionCall, check_linear
from performers.convert.interface.implementation import intercept_attention, interface_modules

__all__ = ["exact_attention", "replace_attention"]


def exact_attention(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
) -> Tensor:
    """Softmax attention as torch computes it, with the call that `replace_attention` makes.

    Args:
        layer: The layer's index; not used.
        query: (B, H, L, D).
        key: (B, Hkv, L, D).
        value: (B, Hkv, L, Dv).
        scale: The factor of the scores.
        is_causal: Whether a position sees only itself and what precedes it.
        key_mask: (B, L) bool, True where a key takes part; None: all do.

    Returns:
        (B, H, L, Dv). Queries that see no key get zeros.
    """
    if key_mask is None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True
        )
    mask = key_mask[:, None, None, :].expand(-1, 1, query.shape[2], -1)
    if is_causal:
        mask = mask.tril()
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return output.masked_fill(~mask.any(dim=-1, keepdim=True), 0)


@contextlib.contextmanager
def replace_attention(
    model: PreTrainedModel, attention: Callable[..., Tensor]
) -> Iterator[PreTrainedModel]:
    """Inside this context every attention layer of a model is computed by a function.

    The function is called as ``attention(layer, query, key, value, *, scale, is_causal, key_mask)``
    with query (B, H, L, D), key (B, Hkv, L, D), value (B, Hkv, L, Dv), key_mask (B, L) bool or
    None, and returns (B, H, L, Dv); `exact_attention` is one. ``layer`` is the attention module's
    ``layer_idx`` or, where it has none, its place in the order of calls. The model runs without a
    key-value cache and without attention dropout. Its own attention is back afterwards, also after
    an error.

    Args:
        model: A transformers model whose attention goes through the attention interface.
        attention: The function.

    Yields:
        The model.

    Raises:
        TypeError: The model is not a transformers model.
        ValueError: Its attention does not go through the interface or, when it is called, is not
            self-attention by softmax under a causal or key-padding mask.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    order: dict[nn.Module, int] = {}

    def replaced(call: AttentionCall) -> Tensor:
        index = getattr(call.module, "layer_idx", None)
        place = order.setdefault(call.module, len(order))
        if call.key.shape[2] != call.query.shape[2] or call.pattern.sequence_ids is not None:
            raise ValueError(
                f"{call.name} has {call.query.shape[2]} queries and {call.key.shape[2]} keys, or "
                "packed sequences; only self-attention over one sequence a row and without a "
                "key-value cache can be replaced: use use_cache=False"
            )
        check_linear(call)
        output = attention(
            place if index is None else index,
            call.query,
            call.key,
            call.value,
            scale=call.scale,
            is_causal=call.pattern.is_causal,
            key_mask=call.pattern.key_mask,
        )
        expected = (*call.query.shape[:3], call.value.shape[-1])
        if tuple(output.shape) != expected:
            raise ValueError(
                f"attention must return (B, H, L, Dv) = {expected} for {call.name}, "
                f"got {tuple(output.shape)}"
            )
        return output

    modules = [module for _, module in interface_modules(model)]
    with intercept_attention(dict.fromkeys(modules, replaced), model):
        yield model
