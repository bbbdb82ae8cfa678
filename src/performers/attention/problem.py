"""The checked arguments of one attention call, as every backend receives them."""

from typing import NamedTuple

import torch
from torch import Tensor

from performers.attention.state import FavorState
from performers.features import FeatureForm


class AttentionProblem(NamedTuple):
    """One attention call, checked and brought to one layout.

    Attributes:
        query: Shape ``(batch, key_heads, groups, L, head_dim)``: the query heads that share a key
            head stand together.
        key: Shape ``(batch, key_heads, S, head_dim)``.
        value: Shape ``(batch, key_heads, S, value_dim)``.
        form: The feature map; its ``num_heads`` is 1 or ``key_heads``.
        scale: The factor on ``q . k``.
        is_causal: Whether query ``i`` sees only the keys up to ``i``; then ``L == S``.
        key_mask: Shape ``(batch, S)``, True where a key takes part, or None.
        segments: Shape ``(S,)``, the packed sequence each position belongs to, or None.
        state: The past of a causal call, or None.
        return_state: Whether the state after the last key is wanted.
        dtype: The dtype to compute in: float32, or float64 for float64 inputs.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    form: FeatureForm
    scale: float
    is_causal: bool
    key_mask: Tensor | None
    segments: Tensor | None
    state: FavorState | None
    return_state: bool
    dtype: torch.dtype
