"""What runs before the forward pass of a converted attention module."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from performers.convert.cache import leave_cache_layer, state_layer, take_cache_layer

# A model that comes out of a pickle brings this module along, and with it the registration.
from performers.convert.interface import IMPLEMENTATION

__all__ = ["enter_attention"]

_NAMES = ("past_key_values", "past_key_value", "layer_past")


def enter_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: the module's layer of the cache becomes a state.

    The attention interface is not told of the cache, so the layer is left for `take_cache_layer`.
    With another attention implementation than ``"favor"`` nothing happens.

    Args:
        module: The attention module.
        args: Of its forward pass.
        kwargs: Of its forward pass.

    Raises:
        ValueError: The cache cannot hold the state, see `state_layer`, or the module does not
            know which layer is its own.
    """
    # What a call that failed has left.
    take_cache_layer(module)
    config: Any = module.config
    if config._attn_implementation != IMPLEMENTATION:
        return
    cache = next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)
    if cache is None:
        cache = next((x for x in args if isinstance(x, Cache)), None)
    if cache is None:
        return
    index: Any = getattr(module, "layer_idx", None)
    if index is None:
        raise ValueError(f"{type(module).__name__} has no layer_idx: it cannot use a cache")
    layer = state_layer(cache, index)
    layer.expect()
    leave_cache_layer(module, layer)
