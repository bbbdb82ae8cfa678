"""The ``torch`` backend: linear time and memory with ordinary torch operations.

Keys are read in blocks and summed into one small state per head, queries are read in blocks
against it; a causal call runs through both together, block by block, each block in chunks. With
gradients enabled blocks are checkpointed: what is kept is the inputs, the output and a state per
block, and features are computed again in the backward pass.

Scaling. Feature ``f`` of all keys is divided by ``e^{s_f}``, where ``s_f`` is the largest exponent
seen so far, and a query's features are multiplied by it and divided by their maximum over ``f``;
so the leading term of every normaliser is one. Among the pairs within a causal chunk, where a
maximum over the chunk would let a later key touch an earlier row, each key is divided by its own
largest feature instead, and its scale enters the small matrix of pairs after masking, as in a
softmax. Scales are constants to autograd: the quotient does not depend on them.

Exact pairs. What a query meets exactly (``exact.py``) and what it meets through features are two
parts of its row, merged at the larger of their scales. Keys beyond a window of ``w`` are the strict
past of the keys delayed by ``w``, and for the other direction of the reversed row: the causal
algorithm computes both, and nothing has to be subtracted.
"""

# torch.compile (2.6) cannot evaluate the annotations of local functions.
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from performers.attention.call import AttentionCall
from performers.attention.nonfinite import without_nonfinite
from performers.attention.state import FavorState
from performers.attention.torch_backend.blocks import (
    Features,
    Rows,
    Sums,
    block_rows,
    block_sizes,
    in_blocks,
    read,
    sum_keys,
)
from performers.attention.torch_backend.causal import causal_rows
from performers.attention.torch_backend.exact import sink_rows, window_rows
from performers.attention.torch_backend.listed import split_listed
from performers.attention.torch_backend.positions import (
    position_feature_rows,
    position_window_rows,
)
from performers.features.precision import without_autocast


def attend(call: AttentionCall) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key; see ``Backend``."""
    features = Features.of_call(call)
    call, touched = without_nonfinite(call)
    past = call.past()
    with without_autocast(call.query.device):
        if call.query.shape[-2] == 0:
            return _empty_output(call), past
        exact = call.has_exact_pairs()
        rows, sums = _feature_rows(call, features, Sums(*past.sums()), divided=not exact)
        out = _with_exact_pairs(call, features, Rows(*rows)).out() if exact else rows[0]
    state = FavorState(*sums) if call.return_state else None
    return (out, state) if touched is None else touched.marked(out, state)


def attend_part(call: AttentionCall) -> Rows:
    """Attention of which other keys have a share, not yet divided; see ``Backend``."""
    features = Features.of_call(call)
    call, touched = without_nonfinite(call)
    with without_autocast(call.query.device):
        fields, _ = _feature_rows(call, features, Sums(*call.past().sums()), divided=False)
        rows = Rows(*fields)
        if call.has_exact_pairs():
            rows = _with_exact_pairs(call, features, rows)
    if touched is None:
        return rows
    return Rows(touched.marked(rows.numerator, None)[0], rows.denominator, rows.log_scale)


def _empty_output(call: AttentionCall) -> Tensor:
    """No rows, but in the graph of the inputs, so that backward works."""
    width = call.value.shape[-1]
    rows = call.query.to(call.dtype)[..., :1].expand(*call.query.shape[:-1], width)
    return rows + 0 * (call.key.sum() + call.value.sum()).to(call.dtype)


def _feature_rows(
    call: AttentionCall, features: Features, sums: Sums, *, divided: bool
) -> tuple[tuple[Tensor, ...], Sums]:
    """Every query against the keys beyond its window, as ``causal_rows`` returns them.

    Running sums that restart at the boundaries of packed sequences need no list of lengths on the
    host and no padding: each sequence attends to its past, then to its future.
    """
    if call.positions is not None:
        return position_feature_rows(call, features), sums
    strict = call.window is not None
    if not (strict or call.is_causal or call.segments is not None):
        return _bidirectional_rows(call, features, sums, divided=divided)
    past = _delayed(call) if strict else call
    if call.is_causal:
        return causal_rows(past, features, sums, strict=strict, divided=divided)
    rows, _ = causal_rows(past, features, sums, strict=strict, divided=False)
    future = _future(call, features, sums)
    both = Rows(*rows).plus(future, scaled=features.has_exponent())
    return (both.out(),) if divided else both, sums


def _bidirectional_rows(
    call: AttentionCall, features: Features, sums: Sums, *, divided: bool
) -> tuple[tuple[Tensor, ...], Sums]:
    """Every query against all keys, as ``causal_rows`` returns them."""

    def read_block(query: Tensor) -> tuple[Tensor, ...]:
        rows = read(features, query, total)
        return (rows.out(),) if divided else rows

    size = block_rows(call.key.shape[:2], features, call.key.device)
    key_sizes = block_sizes(call.key.shape[2], size)
    query_sizes = block_sizes(call.query.shape[3], max(1, size // call.query.shape[2]))
    keep = len(key_sizes) == len(query_sizes) == 1
    total = sum_keys(call, features, sums, key_sizes, keep=keep)
    rows, _ = in_blocks(read_block, query_sizes, [(call.query, 3)], keep=keep)
    return rows, total


def _future(call: AttentionCall, features: Features, sums: Sums) -> Rows:
    """Every query against the keys after its position, or beyond the window's reach of it.

    They are the strict past of the reversed row.
    """
    backwards = call.replaced(
        query=call.query.flip(-2),
        key=call.key.flip(-2),
        value=call.value.flip(-2),
        key_mask=None if call.key_mask is None else call.key_mask.flip(-1),
        segments=None if call.segments is None else call.segments.flip(0),
    )
    backwards = _delayed(backwards)
    rows, _ = causal_rows(backwards, features, sums, strict=True, divided=False)
    return Rows(*(x.flip(-2) for x in rows))


def _with_exact_pairs(call: AttentionCall, features: Features, rows: Rows) -> Rows:
    """The rows through features and those of exact pairs, added up."""
    exact = []
    if call.lists is not None:
        rows, listed = split_listed(call, features, rows)
        exact.append(listed)
    if call.window is not None:
        rows_of_window = window_rows if call.positions is None else position_window_rows
        exact.append(rows_of_window(call))
    if call.sink_keys is not None:
        exact.append(sink_rows(call))
    rows = features.beside_exact_pairs(rows, call.query)
    for more in exact:
        rows = rows.plus(more)
    return rows


def _delayed(call: AttentionCall) -> AttentionCall:
    """The call with its keys later by the window: its strict past is what lies beyond.

    Keys that a state held come first, as many as the window: then nothing has to move.
    """
    length = call.query.shape[-2]
    shift = (call.window or 0) - call.offset
    missing, kept = min(shift, length), max(length - shift, 0)
    mask, segments = call.key_mask, call.segments
    if missing:
        mask = F.pad(call.valid_keys()[:, :kept], (missing, 0))
        if segments is not None:
            # The last keys of one sequence must not turn up in the next.
            same = segments[missing:] == segments[:kept]
            mask = mask & F.pad(same, (missing, 0))
    elif mask is not None:
        mask = mask[:, :length]
    return call.replaced(
        key=F.pad(call.key[:, :, :kept], (0, 0, missing, 0)),
        value=F.pad(call.value[:, :, :kept], (0, 0, missing, 0)),
        key_mask=mask,
        segments=segments,
    )
