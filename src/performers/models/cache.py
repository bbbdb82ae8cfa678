"""Cache of a causal model, constant in size for linear attention."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from performers.attention import FavorState
from performers.models.registry import ATTENTIONS

_NOT_CROPPED = (
    "cannot be cropped: use a decoding method that does not roll back (greedy, sampling, beam "
    "search)"
)


class FavorCacheLayer(DynamicLayer):
    """Recurrent state of a layer, in place of keys and values; identity attention has none."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: FavorState | None = None
        self.version: int | None = None
        self.length = 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a state has neither keys nor values."""
        raise TypeError("linear attention keeps a state, not keys and values: call set_state")

    def set_state(self, state: FavorState, new_tokens: int, version: int | None = None) -> None:
        """Replace the state after reading ``new_tokens`` more tokens.

        ``version`` is that of the feature map that the state is of; None: unknown.
        """
        self.state, self.version = state, version
        self.length += new_tokens
        self.is_initialized = True
        # Some models ask an initialised layer how many keys it holds.
        self.keys = self.values = state.key_sum.new_empty(0)

    def check_version(self, version: int | None) -> None:
        """Check that features are those of the state, as far as both versions are known.

        Raises:
            ValueError: The features have been redrawn or loaded since.
        """
        if version != self.version and None not in (version, self.version):
            raise ValueError(
                "past_key_values holds sums over features that were redrawn or loaded since: "
                "redraw between sequences, or begin the sequence again with an empty cache"
            )

    def get_seq_length(self) -> int:
        """Tokens read so far, padding included."""
        return self.length

    def reset(self) -> None:
        """Empty the cache."""
        self.state, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes row ``beam_idx[i]``."""
        if self.state is not None:
            self.state.reorder_(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state is not None:
            rows = torch.arange(self.state.key_sum.shape[0]).repeat_interleave(repeats)
            self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless no token is to be removed: a sum cannot be undone."""
        if tokens_to_remove:
            raise ValueError(f"the state of linear attention {_NOT_CROPPED}")


class PerformerCache(Cache):
    """Cache of a causal Performer: a state per layer, or keys and values in exact layers.

    It also records the padding of the past, so that a continued call needs a mask for the new
    tokens only. ``attention`` and ``exact_layers`` are those of ``PerformerConfig``, ``memory`` is
    the option of exact attention; ``keeps_keys`` is True if all layers keep all keys and values.
    """

    def __init__(
        self,
        attention: str,
        num_layers: int,
        exact_layers: Iterable[int] | None = None,
        memory: int | None = None,
    ) -> None:
        self.attention = attention
        self.exact_layers = tuple(exact_layers or ())
        layer: Any = ATTENTIONS[attention].cache or FavorCacheLayer
        if memory is not None:
            # A window has the token itself, too.
            layer = partial(DynamicSlidingWindowLayer, sliding_window=memory + 1)
        self._kinds = [DynamicLayer if i in self.exact_layers else layer for i in range(num_layers)]
        super().__init__(layers=[kind() for kind in self._kinds])
        self.keeps_keys = all(kind is DynamicLayer for kind in self._kinds)
        self._keeps_some = any(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.layers
        )
        self.real_tokens: Tensor | None = None
        # True for keys that are not padding; None while none is padding.
        self.key_mask: Tensor | None = None

    def extend(self, mask: Tensor) -> Tensor:
        """Count the tokens of a call, True in a mask ``(B, L)`` where they are no padding.

        Returns the positions ``(B, L)`` among the tokens that are not padding.
        """
        past = mask.new_zeros(mask.shape[0], 1, dtype=torch.int64)
        if self.real_tokens is not None:
            past = self.real_tokens
            if len(past) != len(mask):
                raise ValueError(
                    f"past_key_values holds {len(past)} row(s) but the input has {len(mask)}: "
                    "continue every row of the earlier call, or see batch_select_indices and "
                    "batch_repeat_interleave"
                )
        counts = mask.long().cumsum(-1)
        self.real_tokens = past + counts[:, -1:]
        if self._keeps_some and (self.key_mask is not None or not bool(mask.all())):
            self.key_mask = torch.cat((self._held_mask(len(mask), mask.device), mask), dim=-1)
        return (past + counts - 1).clamp_min(0)

    def _held_mask(self, rows: int, device: torch.device) -> Tensor:
        """``key_mask`` of the keys that are held; of a memory, these are the last."""
        layers = (layer for layer in self.layers if not isinstance(layer, FavorCacheLayer))
        keys = getattr(next(layers), "keys", None)
        held = 0 if keys is None or not keys.numel() else keys.shape[-2]
        if self.key_mask is None:
            return torch.ones(rows, held, dtype=torch.bool, device=device)
        return self.key_mask[:, self.key_mask.shape[1] - held :]

    def _parts(self) -> Iterator[tuple[Any, str, Any]]:
        """Each layer with the name and value of each state, keys or values in it."""
        for layer in self.layers:
            for name in ("state", "keys", "values"):
                if getattr(layer, name, None) is not None:
                    yield layer, name, getattr(layer, name)

    def detach_(self) -> "PerformerCache":
        """Take the past out of the autograd graph (truncated back-propagation); returns self."""
        for layer, name, part in self._parts():
            setattr(layer, name, part.detach())
        return self

    def forget_(self, rows: Tensor) -> "PerformerCache":
        """Forget the past where ``rows`` ``(B,)`` is True: sequences begin anew; returns self."""
        if self.real_tokens is None or not bool(rows.any()):
            return self
        if bool(rows.all()):
            self.reset()
            return self
        rows = rows.to(self.real_tokens.device)
        self.real_tokens = self.real_tokens.masked_fill(rows[:, None], 0)
        for layer in self.layers:
            if isinstance(layer, FavorCacheLayer) and layer.state is not None:
                layer.state.forget_(rows)
        if self._keeps_some:
            held = self._held_mask(len(rows), rows.device)
            self.key_mask = held & ~rows[:, None]
        return self

    def state_dict(self) -> dict[str, Any]:
        """The past as tensors and ``FavorState``, which ``torch.load`` reads with weights only."""
        layers: list[Any] = []
        for layer in self.layers:
            if isinstance(layer, FavorCacheLayer):
                layers.append((layer.state, None, layer.length))
            else:
                layers.append((layer.keys, layer.values, layer.get_seq_length()))
        return {"layers": layers, "real_tokens": self.real_tokens, "key_mask": self.key_mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a ``state_dict`` of a cache with the same arguments.

        Raises:
            ValueError: The numbers of layers differ.
        """
        if len(state["layers"]) != len(self.layers):
            raise ValueError(
                f"state has {len(state['layers'])} layers, expected {len(self.layers)}: use that "
                "of a model of the same shape"
            )
        self.reset()
        for layer, (first, second, length) in zip(self.layers, state["layers"], strict=True):
            if first is None:
                continue
            if isinstance(layer, FavorCacheLayer):
                layer.set_state(first, length)
            else:
                layer.update(first, second)
                layer.cumulative_length = length
        self.real_tokens, self.key_mask = state["real_tokens"], state["key_mask"]

    @property
    def nbytes(self) -> int:
        """Bytes of all states, keys and values."""
        return sum(part.nbytes for _, _, part in self._parts())

    def reset(self) -> None:
        """Empty the cache."""
        # In some releases of transformers a layer that is reset keeps its length, of zeros.
        self.layers = [kind() for kind in self._kinds]
        self.real_tokens = self.key_mask = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes row ``beam_idx[i]``, as beam search asks."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.real_tokens is not None:
            self._select(torch.arange(self.real_tokens.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        super().batch_select_indices(indices)
        self._select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as ``transformers.Cache.crop`` does; refused with sums."""
        # Early releases of transformers 5 take 0 for the length to keep.
        if not tokens_to_remove:
            return
        # Refused before any layer is cropped.
        for layer in self.layers:
            if isinstance(layer, FavorCacheLayer):
                layer.crop(tokens_to_remove)
            elif isinstance(layer, DynamicSlidingWindowLayer):
                raise ValueError(f"the memory of exact attention {_NOT_CROPPED}")
        before = self.get_seq_length()
        super().crop(tokens_to_remove)
        removed = before - self.get_seq_length()
        if self.real_tokens is None or not removed:
            return
        if self.key_mask is None:
            self.real_tokens = self.real_tokens - removed
        else:
            self.real_tokens = self.real_tokens - self.key_mask[:, -removed:].sum(-1, keepdim=True)
            self.key_mask = self.key_mask[:, :-removed]

    def _select(self, rows: Tensor) -> None:
        for name in ("real_tokens", "key_mask"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))
