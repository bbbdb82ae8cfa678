"""Sliding windows, alone and with dilation and global tokens: Longformer.

Beltagy et al. 2020, arXiv 2004.05150.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from performers.app.options import option
from studies.comparators.blocks import (
    FAR,
    AttentionOptions,
    Comparator,
    SequenceRows,
    attend_allowed,
    attend_window,
    join_columns,
    take_columns,
)


@dataclass(frozen=True, kw_only=True)
class LocalOptions(AttentionOptions):
    """Options of ``local``."""

    window: int = option("Tokens seen to each side.", 128, at_least=0)


class LocalMechanism(Comparator):
    """Softmax attention to the keys with ``|i - j| <= window``.

    ``O(L * window)``; see `attend_window`. Distances are those of places in the row.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """See `Comparator.attend`."""
        window = self.options.window
        return attend_window(query, key, value, rows.places, window, is_causal=rows.is_causal)


@dataclass(frozen=True, kw_only=True)
class LongformerOptions(AttentionOptions):
    """Options of ``longformer``."""

    window: int = option("Tokens seen to each side.", 128, at_least=0)
    dilation: int = option("Difference between the places of two of them.", 1, at_least=1)
    global_tokens: int = option(
        "First tokens of a sequence that all see and that see all.", 1, at_least=0
    )


class LongformerMechanism(Comparator):
    """Softmax attention to a window with gaps, and to and from a few global tokens.

    A token sees ``window`` tokens to each side of it, ``dilation`` apart, and the first
    ``global_tokens`` of its sequence, which themselves see all. The causal form hides later tokens.
    With dilation the tokens are dealt out to ``dilation`` rows, whose windows have no gaps:
    ``O(L * (window + global_tokens))``. Tokens are counted from the first of each sequence, masked
    ones left out. All heads have one dilation, and global tokens the same projections as others:
    the paper dilates two heads of the upper layers, and projects global tokens apart.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """See `Comparator.attend`."""
        options, longest = self.options, query.shape[2]
        step, count = options.dilation, options.global_tokens
        queries, keys, values = (take_columns(x, step) for x in (query, key, value))
        places = take_columns(rows.ranks[:, None, :, None], step, FAR)[:, 0, :, 0]
        shown = (key[:, :, :count], value[:, :, :count], rows.ranks[:, :count])
        more_keys, more_values, more = (x.repeat_interleave(step, dim=0) for x in shown)
        out = attend_window(
            queries,
            keys,
            values,
            places,
            options.window,
            is_causal=rows.is_causal,
            spacing=step,
            first=(more_keys, more_values, more),
        )
        out = join_columns(out, step, longest)
        if rows.is_causal or not count:
            return out
        whole = attend_allowed(query[:, :, :count], key, value, rows.real[:, None, None])
        return torch.cat((whole, out[:, :, count:]), dim=2)
