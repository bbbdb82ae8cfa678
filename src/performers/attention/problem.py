"""The checked arguments of one attention call, as every backend receives them."""

from typing import NamedTuple

import torch
from torch import Tensor

from performers.attention.buckets import KeyLists
from performers.attention.state import FavorState
from performers.features import FeatureForm


class SinkKeys(NamedTuple):
    """The first keys of each sequence, exact for every query that sees them.

    Attributes:
        key: Shape ``(sequences, key_heads, sinks, head_dim)``; ``sequences`` is the batch, or the
            number of packed sequences.
        value: Shape ``(sequences, key_heads, sinks, value_dim)``.
        first: Shape ``(sequences, sinks)``, int64: the first query, as an index into the length
            axis, that sees the sink; the length for a sink that is not there.
        place: Shape ``(sequences, sinks)``, int64: where the sink stands among the keys of this
            call, or -1 for one that a state held or that is not there.
    """

    key: Tensor
    value: Tensor
    first: Tensor
    place: Tensor


class AttentionProblem(NamedTuple):
    """One attention call, checked and brought to one layout.

    Query ``i`` stands at the position of key ``i + offset``. It meets exactly, that is with
    ``exp(scale q . k)``, the sinks it sees, the keys ``j`` of its own sequence with
    ``|i + offset - j| <= window``, and those in its list; all others it meets through features.
    Sinks are not among the keys of ``key_mask``.

    Attributes:
        query: Shape ``(batch, key_heads, groups, L, head_dim)``: the query heads that share a key
            head stand together.
        key: Shape ``(batch, key_heads, S, head_dim)``; the first ``offset`` are those that a state
            held besides its sums.
        value: Shape ``(batch, key_heads, S, value_dim)``.
        form: The feature map; its ``num_heads`` is 1 or ``key_heads``.
        scale: The factor on ``q . k``.
        is_causal: Whether query ``i`` sees only the keys up to ``i + offset``; then
            ``S == L + offset``.
        key_mask: Shape ``(batch, S)``, True where a key takes part (and is no sink), or None.
        segments: Shape ``(S,)``, the packed sequence each position belongs to, or None.
        state: The sums over the keys before the first of ``key``, for a causal call, or None.
        return_state: Whether the sums that a later call continues from are wanted: those over all
            keys but the last ``window``.
        window: The reach of exact pairs, or None for no exact pairs.
        offset: Keys before the position of the first query: ``window`` with a state, else 0.
        sinks: The exact keys of each sequence, or None.
        dtype: The dtype to compute in: float32, or float64 for float64 inputs.
        lists: Further exact keys of each query, chosen by content, or None. They are among the keys
            of ``key_mask``; pairs within the window do not count twice.
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
    window: int | None
    offset: int
    sinks: SinkKeys | None
    dtype: torch.dtype
    lists: KeyLists | None = None

    def has_exact_terms(self) -> bool:
        """Whether some keys are met exactly."""
        return not (self.window is None and self.sinks is None and self.lists is None)
