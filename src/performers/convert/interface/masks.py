"""Attention masks of transformers models, without their matrices.

transformers defines a mask by a function of two positions. That function is decomposed into the
terms of linear attention: causal or not, padding, a sliding window, packed sequences. Linear layers
refuse anything else; exact layers get the dense mask that transformers would have made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from performers.convert.options import LEAVE_EXACT
from performers.models.arguments import boundaries, is_tracing, run_starts


@dataclass(eq=False)
class AttentionPattern:
    """Replacement of a model's attention mask.

    Attributes:
        is_causal: A query sees itself and the keys before it.
        key_mask: (B, S) bool, True where a key takes part; None: all do.
        window: Sliding window of the model, keys with ``|i - j| <= window``; None: unlimited.
        sequence_ids: (B, L); tokens with different ids do not see each other; None: one sequence.
        unknown: Description of a pattern that the above cannot express; None: they do.
        make_dense: Makes the mask for ``scaled_dot_product_attention``.
        past: Number of tokens before the queries of this call, in the cache.
        shape: Shape of the mask that this replaces, (B, 1, L, S). Some models make their masks
            early and pass them to their parts, which recognise a finished one by its four axes.
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
        """Starts of sequences when all rows are laid end to end, and ``B * L``; int32."""
        ids = self.sequence_ids
        if ids is None:
            return None
        return boundaries(run_starts(ids)).to(torch.int32)

    @property
    def ndim(self) -> int:
        """Number of axes of the mask that this replaces."""
        return 4

    def contiguous(self) -> AttentionPattern:
        """Return the pattern itself."""
        return self

    def on(self, device: torch.device) -> AttentionPattern:
        """Move the pattern to another device."""
        masks = self.key_mask, self.sequence_ids
        key_mask, ids = (None if x is None else x.to(device) for x in masks)
        return replace(self, key_mask=key_mask, sequence_ids=ids)

    def dense(self, device: torch.device | None = None) -> Tensor | None:
        """Make the mask (B or 1, 1, L, S) for torch's attention, once; None: none is needed."""
        if not self._dense:
            self._dense.append(None if self.make_dense is None else self.make_dense())
        mask = self._dense[0]
        return mask if mask is None else mask.to(device)


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
    """Make the mask of a call; registered with transformers' ``AttentionMaskInterface``.

    ``attention_mask`` is ``(B, tokens so far)`` bool, True where a token is not padding; or an
    earlier pattern, which is returned. ``keywords`` go to transformers' function for the dense
    mask.
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
        columns = attention_mask.shape[-1]
        if columns < kv_length and columns != q_length:
            raise ValueError(
                f"attention_mask must cover the {kv_length} tokens so far, or the {q_length} of "
                f"this call, got {columns} columns"
            )
        mask = attention_mask[:, -kv_length:].to(torch.bool)
        pattern.key_mask = None if not is_tracing() and bool(mask.all()) else mask
    return pattern


def _read(function: Callable[..., Any], pattern: AttentionPattern) -> AttentionPattern:
    """Add the condition of a mask function of transformers to a pattern."""
    if function is masking_utils.causal_mask_function:
        return replace(pattern, is_causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return pattern
    name = getattr(function, "__qualname__", type(function).__name__)
    inner: dict[str, Any] = {}
    if getattr(function, "__module__", None) == masking_utils.__name__:
        inner = dict(inspect.getclosurevars(function).nonlocals)
    match name.split(".")[0], inner:
        case "and_masks", {"mask_functions": parts}:
            for part in parts:
                pattern = _read(part, pattern)
            return pattern
        case "sliding_window_overlay", {"sliding_window": window}:
            # This window counts the query itself.
            return replace(pattern, window=int(window) - 1)
        case "sliding_window_bidirectional_overlay", {"sliding_window": window}:
            return replace(pattern, window=int(window))
        case "packed_sequence_mask_function", {"packed_sequence_mask": ids}:
            return replace(pattern, sequence_ids=ids)
        case "remap_positions_for_packed_sequence", {"mask_function": inside}:
            # Positions within a sequence are consecutive: differences are those of the index.
            return _read(inside, pattern)
    return replace(pattern, unknown=f"a mask of its own ({name})")


def check_reading(pattern: AttentionPattern, name: str) -> None:
    """Check a pattern without a window against the dense mask that it replaces; quadratic."""
    dense = pattern.dense()
    if dense is None or dense.ndim != 4:
        return
    seen = dense if dense.dtype == torch.bool else dense == 0
    read = torch.ones_like(seen[:, :1])
    if pattern.is_causal:
        read = read.tril()
    if pattern.key_mask is not None:
        read = read & pattern.key_mask[:, None, None, :].to(seen.device)
    if pattern.sequence_ids is not None:
        ids = pattern.sequence_ids.to(seen.device)
        read = read & (ids[:, None, :, None] == ids[:, None, None, :])
    # transformers lets queries that see nothing see any key.
    counts = read.any(-1, keepdim=True)
    if not bool(((seen == read) | ~counts).all()):
        raise ValueError(
            f"{name} attends by a mask that is neither causal, nor padding, a window or packed "
            f"sequences, which linear attention cannot do: {LEAVE_EXACT}"
        )
