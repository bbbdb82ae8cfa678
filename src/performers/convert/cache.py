"""A converted decoder's past: constant in size, inside transformers' own cache object."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from performers.convert.block import BLOCK
from performers.models.cache import FavorCacheLayer

__all__ = ["ConvertedCacheLayer", "enter_attention", "take_cache_layer"]

_NAMES = ("past_key_values", "past_key_value", "layer_past")
# A forward pass of one thread: the cache layer of the attention module that is running.
_RUNNING = threading.local()


class ConvertedCacheLayer(FavorCacheLayer):
    """The state of one linear layer where transformers would keep keys and values.

    Holds the sums, the first ``sinks`` and the last ``window`` keys and values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unread = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of this call as they are; attention adds them to the state."""
        if self._unread:
            raise RuntimeError(
                "keys and values of an earlier call never reached linear attention: the model's "
                "attention implementation was changed, or a call failed; start with a new cache"
            )
        self._unread = True
        return key_states, value_states

    def set_state(self, state: Any, new_tokens: int) -> None:
        """Replace the state after reading ``new_tokens`` more tokens."""
        super().set_state(state, new_tokens)
        self._unread = False

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._unread = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.state is None else self.state.nbytes


def enter_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a converted module: its layer of the cache becomes a state.

    The attention interface is not told of the cache, so the layer is left for `take_cache_layer`.

    Args:
        module: The attention module.
        args: Of its forward pass.
        kwargs: Of its forward pass.

    Raises:
        ValueError: The cache holds keys and values of the past, or is of a kind that cannot hold a
            state.
    """
    cache = next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)
    if cache is None:
        cache = next((x for x in args if isinstance(x, Cache | EncoderDecoderCache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers: dict[int, ConvertedCacheLayer] = _running()
    layers.pop(id(module), None)
    if cache is not None and getattr(module, BLOCK, None) is not None:
        index = getattr(module, "layer_idx", None)
        if index is None:
            raise ValueError(f"{type(module).__name__} has no layer_idx: it cannot use a cache")
        layers[id(module)] = _state_layer(cache, index)


def take_cache_layer(module: nn.Module) -> ConvertedCacheLayer | None:
    """What `enter_attention` left for the running call of a module.

    Args:
        module: The attention module.
    """
    return _running().pop(id(module), None)


def _running() -> dict[int, ConvertedCacheLayer]:
    if not hasattr(_RUNNING, "layers"):
        _RUNNING.layers = {}
    found: dict[int, ConvertedCacheLayer] = _RUNNING.layers
    return found


def _state_layer(cache: Any, index: int) -> ConvertedCacheLayer:
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values must be a transformers Cache, got {type(cache)}")
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, ConvertedCacheLayer):
        return layer
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
    cache.layers[index] = ConvertedCacheLayer()
    return cache.layers[index]
