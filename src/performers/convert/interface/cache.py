"""State of a converted decoder in the cache of transformers, constant in size."""

import threading
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from performers.models.cache import FavorCacheLayer


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
