"""Longformer's window with dilation and global tokens (Beltagy et al. 2020, arXiv 2004.05150)."""

import torch
from torch import Tensor

from studies.comparators.blocks import (
    FAR,
    Comparator,
    SequenceRows,
    attend_allowed,
    attend_window,
    join_columns,
    take_columns,
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

    shown = ("window", "dilation", "global_tokens")

    def __init__(self, window: int, dilation: int, global_tokens: int) -> None:
        super().__init__()
        self.window = window
        self.dilation = dilation
        self.global_tokens = global_tokens

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """See `Comparator.attend`."""
        step, count, longest = self.dilation, self.global_tokens, query.shape[2]
        queries, keys, values = (take_columns(x, step) for x in (query, key, value))
        places = take_columns(rows.ranks[:, None, :, None], step, FAR)[:, 0, :, 0]
        shown = (key[:, :, :count], value[:, :, :count], rows.ranks[:, :count])
        more_keys, more_values, more = (x.repeat_interleave(step, dim=0) for x in shown)
        out = attend_window(
            queries,
            keys,
            values,
            places,
            self.window,
            is_causal=rows.is_causal,
            spacing=step,
            first=(more_keys, more_values, more),
        )
        out = join_columns(out, step, longest)
        if rows.is_causal or not count:
            return out
        whole = attend_allowed(query[:, :, :count], key, value, rows.real[:, None, None])
        return torch.cat((whole, out[:, :, count:]), dim=2)
