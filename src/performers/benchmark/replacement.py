"""Every attention layer of a transformers model computed by a function of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

__all__ = ["exact_attention", "replace_attention"]

_IMPLEMENTATION = "performers_replaced"
# Arguments of the attention interface that make attention something else than masked softmax.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")
# The interface calls one registered function for all models; it finds its replacement here.
_REPLACEMENTS: WeakKeyDictionary[nn.Module, Callable[..., Tensor]] = WeakKeyDictionary()


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
    AttentionInterface.register(_IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, _whole_mask)
    configs = {
        id(module.config): module.config
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    }
    before = [(config, config._attn_implementation) for config in configs.values()]
    modules = list(model.modules())
    outer = {module: _REPLACEMENTS[module] for module in modules if module in _REPLACEMENTS}
    order: dict[nn.Module, int] = {}

    def numbered(module: nn.Module, *tensors: Tensor, **rest: Any) -> Tensor:
        index = getattr(module, "layer_idx", None)
        place = order.setdefault(module, len(order))
        return attention(place if index is None else index, *tensors, **rest)

    try:
        model.set_attn_implementation(_IMPLEMENTATION)
        if any(config._attn_implementation != _IMPLEMENTATION for config in configs.values()):
            raise ValueError(
                f"the attention of {type(model).__name__} does not go through the attention "
                "interface of transformers and cannot be replaced"
            )
        _REPLACEMENTS.update(dict.fromkeys(modules, numbered))
        yield model
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        for module in modules:
            _REPLACEMENTS.pop(module, None)
        _REPLACEMENTS.update(outer)


def _whole_mask(*arguments: Any, **keywords: Any) -> Tensor:
    """The mask (B, 1, L, S) in full, also where transformers would leave it out."""
    keywords |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*arguments, **keywords)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention interface's function: check what is asked for, and ask the replacement."""
    name = type(module).__name__
    present = [option for option in _UNSUPPORTED if keywords.get(option) is not None]
    if present:
        raise ValueError(f"{name} uses {', '.join(present)}: not plain softmax attention")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{name} has {query.shape[2]} queries and {key.shape[2]} keys; only self-attention "
            "without a key-value cache can be replaced: use use_cache=False"
        )
    is_causal, key_mask = _pattern(name, attention_mask, getattr(module, "is_causal", False))
    output = _REPLACEMENTS[module](
        module,
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=is_causal,
        key_mask=key_mask,
    )
    expected = (*query.shape[:3], value.shape[-1])
    if tuple(output.shape) != expected:
        raise ValueError(
            f"attention must return (B, H, L, Dv) = {expected} for {name}, "
            f"got {tuple(output.shape)}"
        )
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def _pattern(name: str, mask: Tensor | None, is_causal: bool) -> tuple[bool, Tensor | None]:
    """Take a mask (B, 1, L, L) apart into causality and hidden keys, or refuse it."""
    if mask is None:
        return is_causal, None
    if mask.dtype == torch.bool:
        key_mask = mask.any(dim=2)[:, 0]
        rows = key_mask[:, None, None, :].expand_as(mask)
        # A single position is causal and not: the module's own word comes first.
        for causal in (is_causal, not is_causal):
            if torch.equal(mask, rows.tril() if causal else rows):
                return causal, None if bool(key_mask.all()) else key_mask
    raise ValueError(
        f"the mask of {name} is neither causal nor key padding (a sliding window, packed sequences "
        "or a bias); it cannot be described to the replacement"
    )
