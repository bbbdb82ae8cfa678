"""Which keys a query of a transformers model sees, without the matrix of masks.

transformers asks an attention implementation for its masks with a function of two positions. That
function is taken apart into what linear attention can be told: causal or not, padding, a sliding
window, packed sequences. What cannot be said so has a reason, and layers that are linear refuse it;
layers that are exact get the dense mask that transformers would have made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from performers.models.arguments import is_tracing

__all__ = ["AttentionPattern", "check_reading", "pattern_mask"]


@dataclass(eq=False)
class AttentionPattern:
    """What stands in the place of a model's attention mask.

    Attributes:
        is_causal: A query sees itself and what precedes it.
        key_mask: (B, S) bool, True where a key takes part; None: all do.
        window: A query sees keys with ``|i - j| <= window`` only; None: no such limit. This is the
            model's own sliding window.
        sequence_ids: (B, L); tokens with different ids do not see each other; None: one sequence.
        unknown: Why the pattern is not described by the above; None: it is.
        make_dense: Makes the mask that ``scaled_dot_product_attention`` would get.
        past: Tokens that precede the queries of this call, by the cache that the model was given.
        shape: Of the mask that this stands for, (B, 1, L, S). Some models make their masks early
            and hand them to their parts, which know a finished one by its four axes.
    """

    is_causal: bool = False
    key_mask: Tensor | None = None
    window: int | None = None
    sequence_ids: Tensor | None = None
    unknown: str | None = None
    make_dense: Callable[[], Tensor | None] | None = None
    past: int | Tensor = 0
    shape: tuple[int, int, int, int] | None = None
    _dense: list[Tensor | None] = field(default_factory=list)

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Where sequences begin when all rows are laid end to end, and ``B * L``; int32."""
        ids = self.sequence_ids
        if ids is None:
            return None
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = begins.flatten().nonzero().squeeze(-1)
        return torch.cat((starts, starts.new_full((1,), ids.numel()))).to(torch.int32)

    @property
    def ndim(self) -> int:
        """Axes of the mask that this stands for."""
        return 4

    def contiguous(self) -> AttentionPattern:
        """Itself."""
        return self

    def on(self, device: torch.device) -> AttentionPattern:
        """The same for queries and keys on another device."""
        key_mask, sequence_ids = (
            None if mask is None else mask.to(device) for mask in (self.key_mask, self.sequence_ids)
        )
        return replace(self, key_mask=key_mask, sequence_ids=sequence_ids)

    def dense(self) -> Tensor | None:
        """The mask (B or 1, 1, L, S) for torch's attention, made once; None: none is needed."""
        if not self._dense:
            self._dense.append(None if self.make_dense is None else self.make_dense())
        return self._dense[0]


def pattern_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | AttentionPattern | None = None,
    **keywords: Any,
) -> AttentionPattern:
    """The function registered with transformers' ``AttentionMaskInterface``.

    ``attention_mask`` is ``(B, tokens so far)`` bool, True where a token is not padding; or a
    pattern made earlier, which is returned as it is. ``keywords`` go to transformers' own function
    for the dense mask.
    """
    if isinstance(attention_mask, AttentionPattern):
        return attention_mask

    def dense() -> Tensor | None:
        if attention_mask is not None and attention_mask.shape[-1] < kv_offset + kv_length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[-1]} columns, but an exact layer needs "
                f"one for each of the {kv_offset + kv_length} tokens so far"
            )
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **keywords,
        )

    shape = (batch_size, 1, q_length, kv_length)
    pattern = _read(mask_function, AttentionPattern(make_dense=dense, past=q_offset, shape=shape))
    if attention_mask is not None:
        pattern.key_mask = _taking_part(attention_mask, q_length, kv_length)
    return pattern


def _taking_part(attention_mask: Tensor, q_length: int, kv_length: int) -> Tensor | None:
    """Keys that are not padding, or None where all of them take part."""
    known = attention_mask.shape[-1]
    if known < kv_length and known != q_length:
        raise ValueError(
            f"attention_mask must cover the {kv_length} tokens so far, or the {q_length} of this "
            f"call, got {known} columns"
        )
    mask = attention_mask[:, -kv_length:].to(torch.bool)
    return None if not is_tracing() and bool(mask.all()) else mask


def _read(function: Callable[..., Any], pattern: AttentionPattern) -> AttentionPattern:
    """Add what a mask function of transformers says to a pattern."""
    if function is masking_utils.causal_mask_function:
        return replace(pattern, is_causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return pattern
    name = getattr(function, "__qualname__", type(function).__name__)
    inner: dict[str, Any] = {}
    if getattr(function, "__module__", None) == masking_utils.__name__:
        inner = dict(inspect.getclosurevars(function).nonlocals)
    maker = name.split(".")[0]
    if maker == "and_masks" and "mask_functions" in inner:
        for part in inner["mask_functions"]:
            pattern = _read(part, pattern)
        return pattern
    if maker == "sliding_window_overlay" and "sliding_window" in inner:
        # Its window counts the query itself.
        return replace(pattern, window=int(inner["sliding_window"]) - 1)
    if maker == "sliding_window_bidirectional_overlay" and "sliding_window" in inner:
        return replace(pattern, window=int(inner["sliding_window"]))
    if maker == "packed_sequence_mask_function" and "packed_sequence_mask" in inner:
        return replace(pattern, sequence_ids=inner["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence" and "mask_function" in inner:
        # Within a sequence positions count on by one, so that differences are those of the index.
        return _read(inner["mask_function"], pattern)
    return replace(pattern, unknown=f"a mask of its own ({name})")


def check_reading(pattern: AttentionPattern, length: int, size: int, name: str) -> None:
    """Check a pattern against the dense mask that it stands for; quadratic."""
    dense = pattern.dense()
    if dense is None or dense.ndim != 4:
        return
    seen = dense if dense.dtype == torch.bool else dense == 0
    index = torch.arange(max(length, size), device=seen.device)
    distance = index[:length, None] - index[None, :size]
    read = torch.ones_like(seen[:, :1])
    if pattern.is_causal:
        read = read & (distance >= 0)
    if pattern.window is not None:
        read = read & (distance.abs() <= pattern.window)
    if pattern.key_mask is not None:
        read = read & pattern.key_mask[:, None, None, :].to(seen.device)
    if pattern.sequence_ids is not None:
        ids = pattern.sequence_ids.to(seen.device)
        read = read & (ids[:, None, :, None] == ids[:, None, None, :])
    # Queries that see nothing are let see anything by transformers.
    counts = read.any(-1, keepdim=True)
    if not bool(((seen == read) | ~counts).all()):
        raise ValueError(
            f"{name} attends by a mask that is neither causal, nor padding, a window or packed "
            "sequences, which linear attention cannot do: leave this layer exact with "
            "to_performer(..., layers=...)"
        )
