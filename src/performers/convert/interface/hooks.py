"""Forward pre-hooks of converted models: the cache of an attention module, positions of a model."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from performers.convert.interface.cache import RUNNING, state_layer

# Unpickling a model imports this module, and with it the registration.
from performers.convert.interface.implementation import IMPLEMENTATION
from performers.convert.options import converted_modules
from performers.models.arguments import CACHE_KEYWORDS, is_tracing

# Arguments with a cache that is no transformers Cache; those are recognised by their type.
_NAMES = (*CACHE_KEYWORDS, "past_key_value", "layer_past")


def enter_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Turn the module's layer of the cache into a state; a forward pre-hook.

    The attention interface does not receive the cache, so the layer is stored in ``RUNNING``.
    Other attention implementations than ``"favor"`` are unaffected.
    """
    # Clear what a failed call has left.
    RUNNING.layers.pop(id(module), None)
    config: Any = module.config
    if config._attn_implementation != IMPLEMENTATION:
        return
    cache = find_cache(args, kwargs)
    if cache is None:
        return
    index: Any = getattr(module, "layer_idx", None)
    if index is None:
        raise ValueError(f"{type(module).__name__} has no layer_idx: it cannot use a cache")
    layer = RUNNING.layers[id(module)] = state_layer(cache, index)
    layer.is_expected = True


def is_rotary_model(module: nn.Module) -> bool:
    """Return True if a model computes rotary positions from ``position_ids``."""
    if not isinstance(module, PreTrainedModel):
        return False
    names = inspect.signature(type(module).forward).parameters
    if not {"attention_mask", "position_ids"} <= set(names):
        return False
    return any("RotaryEmbedding" in type(child).__name__ for child in module.children())


def enter_rotary_model(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Start the positions of each row at its first token that is not padding; a forward pre-hook.

    Exact attention depends on differences of rotary positions alone. Random features depend on the
    positions themselves, so that a row padded on the left would not equal the row alone.
    """
    signature = inspect.signature(type(module).forward)
    call = signature.bind_partial(module, *args, **kwargs).arguments
    tokens = call.get("input_ids")
    tokens = call.get("inputs_embeds") if tokens is None else tokens
    if call.get("position_ids") is not None or not isinstance(tokens, Tensor):
        return None
    cache, length, past, padding = find_cache(args, kwargs), tokens.shape[1], 0, None
    config: Any = module.config
    if cache is not None and config._attn_implementation == IMPLEMENTATION:
        indices = [getattr(x, "layer_idx", None) for x in converted_modules(module)]
        if known := [index for index in indices if isinstance(index, int)]:
            first = state_layer(cache, min(known))
            past, padding = first.get_seq_length(), first.padding
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + length:
        padding = (mask.cumsum(-1) == 0).sum(-1)
    if padding is None:
        return None
    if not is_tracing() and not bool((padding > 0).any()):
        return None
    index = torch.arange(past, past + length, device=tokens.device)
    positions = (index - padding.to(tokens.device).unsqueeze(-1)).clamp_min(0)
    place = list(signature.parameters).index("position_ids") - 1
    if place < len(args):
        return (*args[:place], positions, *args[place + 1 :]), kwargs
    return args, {**kwargs, "position_ids": positions}


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Find the cache among the arguments of a forward pass, or None."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            return value
    for name in _NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None
