"""Positions of a row over processes, and the sequences packed into it."""

from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple


class Piece(NamedTuple):
    """Positions ``start`` to ``stop`` of a shard that belong to one sequence.

    ``before`` are the ranks that hold earlier positions of the sequence, in order, and ``after``
    those that hold later ones.
    """

    start: int
    stop: int
    before: tuple[int, ...]
    after: tuple[int, ...]


class Layout(NamedTuple):
    """Sequences of one shard.

    Attributes:
        head: The first, which may begin on an earlier rank.
        inner: Boundaries of the sequences after the first, up to the end of the shard.
        tail: The last, which may go on; ``head`` where there is one.
    """

    head: Piece
    inner: tuple[int, ...]
    tail: Piece


# Room for all ranks' layouts in one step.
@lru_cache(maxsize=256)
def find_layout(
    lengths: tuple[int, ...], rank: int, boundaries: tuple[int, ...] | None, window: int | None
) -> Layout:
    """The sequences of the shard of a rank, of ``lengths`` positions on each.

    ``boundaries`` are where sequences begin and end in the whole row; None for one sequence.

    Raises:
        ValueError: A rank has no position, or fewer than ``window`` between two others of one
            sequence; or the boundaries do not rise from 0 to the length of the row. The same on
            all ranks.
    """
    starts = (0, *accumulate(lengths))
    if min(lengths) < 1:
        raise ValueError(
            f"query must have a position on every rank, got shards of {list(lengths)} positions: "
            "use fewer processes for rows this short"
        )
    ends = (0, starts[-1]) if boundaries is None else boundaries
    if ends[:1] != (0,) or ends[-1] != starts[-1] or list(ends) != sorted(ends):
        shown = list(ends) if len(ends) <= 8 else [*ends[:4], "...", *ends[-2:]]
        raise ValueError(
            f"cu_seqlens must rise from 0 to the length {starts[-1]} of the whole row, got {shown}"
        )
    ends = tuple(sorted(set(ends)))
    for r, (first, last) in enumerate(pairwise(starts)):
        # The shard lies strictly inside one sequence.
        around = bisect_left(ends, first) == bisect_right(ends, last)
        if around and last - first < (window or 0):
            raise ValueError(
                f"window={window} reaches across the whole shard of rank {r}, {last - first} "
                "positions: use fewer processes, or a window no longer than a shard"
            )
    first, last = starts[rank], starts[rank + 1]
    local = list(pairwise(ends[bisect_right(ends, first) - 1 : bisect_left(ends, last) + 1]))

    def piece(a: int, b: int) -> Piece:
        ranks = [r for r in range(len(lengths)) if starts[r] < b and starts[r + 1] > a]
        return Piece(
            max(a - first, 0),
            min(b, last) - first,
            tuple(r for r in ranks if r < rank),
            tuple(r for r in ranks if r > rank),
        )

    inner = tuple(min(b, last) - first for _, b in local)
    return Layout(piece(*local[0]), inner, piece(*local[-1]))
