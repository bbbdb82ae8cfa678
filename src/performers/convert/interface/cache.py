"""A converted decoder's past: constant in size, inside transformers' own cache object."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from performers.models.cache import FavorCacheLayer

__all__ = [
    "ConvertedCacheLayer",
    "check_cache",
    "leave_cache_layer",
    "state_layer",
    "take_cache_layer",
]

# A forward pass of one thread: the cache layer of the attention module that is running.
_RUNNING = threading.local()


class ConvertedCacheLayer(FavorCacheLayer):
    """The state of one linear layer where transformers would keep keys and values.

    Holds the sums, the first ``sinks`` and the last ``window`` keys and values.

    Attributes:
        padding: Padding before the first token of each row, (B,), where positions do not count it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.padding: Tensor | None = None
        self._expected = False

    def expect(self) -> None:
        """The coming call of `update` is that of linear attention."""
        self._expected = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of this call as they are; attention adds them to the state.

        Raises:
            RuntimeError: Another kind of attention asks for keys and values of the past.
        """
        if not self._expected:
            raise RuntimeError(
                "past_key_values holds the state of linear attention, which no other attention "
                "can continue: start with a new cache after set_attn_implementation"
            )
        self._expected = False
        return key_states, value_states

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.padding = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes row ``beam_idx[i]``."""
        super().reorder_cache(beam_idx)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, beam_idx.to(self.padding.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(repeats)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.state is None else self.state.nbytes


def leave_cache_layer(module: nn.Module, layer: ConvertedCacheLayer) -> None:
    """Leave a layer of the cache for the running call of a module."""
    _running()[id(module)] = layer


def take_cache_layer(module: nn.Module) -> ConvertedCacheLayer | None:
    """What `leave_cache_layer` left for the running call of a module."""
    return _running().pop(id(module), None)


def _running() -> dict[int, ConvertedCacheLayer]:
    if not hasattr(_RUNNING, "layers"):
        _RUNNING.layers = {}
    found: dict[int, ConvertedCacheLayer] = _RUNNING.layers
    return found


def state_layer(cache: Any, index: int) -> ConvertedCacheLayer:
    """The layer of a cache that holds a state, put there if the cache is new."""
    cache = check_cache(cache, index)
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    if not isinstance(cache.layers[index], ConvertedCacheLayer):
        cache.layers[index] = ConvertedCacheLayer()
    return cache.layers[index]


def check_cache(cache: Any, index: int) -> Any:
    """Check that a layer of a cache can hold a state.

    Returns the cache, or the one of self-attention within it.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values must be a transformers Cache, got {type(cache)}")
    if cache.offloading:
        raise ValueError(
            "past_key_values moves keys and values away (offloading), which a state of constant "
            "size does not need: leave cache_implementation at its default"
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
