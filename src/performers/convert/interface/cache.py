"""State of a converted decoder in the cache of transformers, and the hooks that reach it."""

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from performers.convert.options import converted_modules
from performers.convert.record import IMPLEMENTATION
from performers.models.arguments import CACHE_KEYWORDS, is_tracing
from performers.models.cache import FavorCacheLayer

# Arguments with a cache that is no transformers Cache; those are recognised by their type.
_NAMES = (*CACHE_KEYWORDS, "past_key_value", "layer_past")


class _Running(threading.local):
    def __init__(self) -> None:
        self.layers: dict[int, ConvertedCacheLayer] = {}


RUNNING = _Running()
"""Cache layers of the attention modules that a thread is running, by the module's id."""


class ConvertedCacheLayer(FavorCacheLayer):
    """State of one linear layer in place of its keys and values.

    Holds the sums, the first ``sinks`` and the last ``window`` keys and values.

    Attributes:
        padding: Number of padding tokens before the first token of each row, (B,); None: unknown.
        is_expected: Whether the next call of `update` is by linear attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.padding: Tensor | None = None
        self.is_expected = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of this call, which attention adds to the state."""
        if not self.is_expected:
            raise RuntimeError(
                "past_key_values holds the state of linear attention, which no other attention "
                "can continue: start with a new cache after set_attn_implementation"
            )
        self.is_expected = False
        return key_states, value_states

    def reset(self) -> None:
        """Clear the layer."""
        super().reset()
        self.padding = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row ``i`` by row ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, beam_idx.to(self.padding.device))


def state_layer(cache: Any, index: int) -> ConvertedCacheLayer:
    """Return the layer of a cache that holds a state, created in a new cache."""
    cache = check_cache(cache, index)
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    if not isinstance(cache.layers[index], ConvertedCacheLayer):
        cache.layers[index] = ConvertedCacheLayer()
    return cache.layers[index]


def check_cache(cache: Any, index: int) -> Any:
    """Check that a layer of a cache can hold a state; returns the cache of self-attention."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values must be a transformers Cache, got {type(cache)}")
    if cache.offloading:
        raise ValueError(
            "past_key_values moves keys and values to another device (offloading), which a state "
            "of constant size does not need: leave cache_implementation at its default"
        )
    layer = cache.layers[index] if index < len(cache.layers) else DynamicLayer()
    if isinstance(layer, ConvertedCacheLayer):
        return cache
    if type(layer) is not DynamicLayer:
        raise ValueError(
            f"past_key_values has a {type(layer).__name__} for a linear layer; only the default "
            "dynamic cache can hold its state: leave cache_implementation at its default"
        )
    if layer.get_seq_length():
        raise ValueError(
            f"past_key_values holds {layer.get_seq_length()} keys and values that another model "
            "computed; a converted model has to read the past itself: start with an empty cache"
        )
    return cache


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
