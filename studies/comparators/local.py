"""Sliding-window attention (Longformer, Beltagy et al. 2020, without global tokens)."""

from torch import Tensor

from studies.comparators.blocks import Comparator, SequenceRows, attend_window


class LocalMechanism(Comparator):
    """Softmax attention to the keys with ``|i - j| <= window``.

    ``O(L * window)``; see `attend_window`. Distances are those of places in the row.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """See `Comparator.attend`."""
        return attend_window(query, key, value, rows.places, self.window, is_causal=rows.is_causal)
