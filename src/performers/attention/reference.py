"""The ``reference`` backend: attention written down as the mathematics, quadratic, in float64.

Every other backend is tested against this one. With ``phi`` the features of ``sqrt(scale) x``,

    out_i = sum_j K_ij v_j / sum_j K_ij n_j

over the columns ``j`` that query ``i`` sees:

    keys        K_ij = phi(q_i) . phi(k_j),         n_j = 1
    exact keys  K_ij = exp(scale q_i . k_j + b_ij), n_j = 1    (window, listed keys, sinks;
                                                                neighbours, with a bias b)
    a state     K_if = phi_f(q_i) e^{log_scale_f},  n_f = key_sum_f,  v_f = key_value_f

and zeros for a query that sees nothing. A kernel is kept as ``factor e^log``, so that nothing
overflows, and each row is scaled by its largest ``log``, as in a softmax.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.call import AttentionCall, masked
from performers.attention.nonfinite import without_nonfinite
from performers.attention.state import FavorState

# A product of features below this may have lost terms to underflow.
_SMALLEST_SAFE_SUM = 1e-200


class _Columns(NamedTuple):
    """Columns that queries meet one by one.

    Attributes:
        key: Shape ``(batch, key_heads, columns, head_dim)``.
        value: Shape ``(batch, key_heads, columns, value_dim)``.
        visible: Which query sees which column, shape ``(batch or 1, 1, 1, L, columns)``, bool.
        exact: Which pairs are exact, a shape that broadcasts with
            ``(batch, key_heads, groups, L, columns)``, bool.
        bias: Added to the logits of exact pairs, of the same kind of shape, or None.
    """

    key: Tensor
    value: Tensor
    visible: Tensor
    exact: Tensor
    bias: Tensor | None


def attend(call: AttentionCall) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key; see ``Backend``."""
    call, touched = without_nonfinite(call)
    past, columns = call.past(), _columns(call)
    values = torch.cat((columns.value.double(), past.key_value.double()), dim=2)
    ones = torch.ones_like(columns.value[..., 0], dtype=torch.float64)
    counts = torch.cat((ones, past.key_sum.double()), dim=2)
    kernel = _kernel(call, columns)
    total = kernel @ counts[:, :, None, :, None]
    out = kernel @ values.unsqueeze(2) / total.where(total != 0, 1.0)
    state = _state(call, past) if call.return_state else None
    out = out.to(call.dtype)
    return (out, state) if touched is None else touched.marked(out, state)


def attention_matrix(call: AttentionCall) -> Tensor:
    """The row-normalised matrix, shape ``(batch, key_heads, groups, L, S)``, float64.

    For calls without packed sequences and state.
    """
    call, touched = without_nonfinite(call)
    size, kernel = call.key.shape[2], _kernel(call, _columns(call))
    matrix = kernel[..., :size]
    if call.sink_keys is not None and size:
        # Back to where the sinks stand among the keys.
        place = call.sink_keys.place[:, None, None, None]
        sinks = kernel[..., size : size + place.shape[-1]].where(place >= 0, 0.0)
        matrix = matrix.scatter_add(-1, place.clamp_min(0).expand_as(sinks), sinks)
    total = matrix.sum(-1, keepdim=True)
    matrix = matrix / total.where(total != 0, 1.0)
    return matrix if touched is None else touched.marked(matrix, None)[0]


def _columns(call: AttentionCall) -> _Columns:
    """The keys and, after them, the sinks of all sequences, with zeros for masked keys."""
    length, size = call.query.shape[-2], call.key.shape[2]
    row = torch.arange(length, device=call.query.device)[:, None]
    position, place = row + call.offset, torch.arange(size, device=row.device)
    key, value = (masked(x, call.key_mask) for x in (call.key, call.value))
    visible = torch.ones(length, size, dtype=torch.bool, device=row.device)
    if call.is_causal:
        visible = visible.tril(call.offset)
    if call.segments is not None:
        visible = visible & (call.segments[:, None] == call.segments)
    visible = visible[None, None, None]
    if call.key_mask is not None:
        visible = visible & call.key_mask[:, None, None, None]
    exact = torch.zeros_like(visible)
    if call.window is not None:
        distance = position - place
        if call.positions is not None:
            of_keys = call.positions.to(row.device).long()[:, None, None]
            distance = of_keys.unsqueeze(-1) - of_keys.unsqueeze(-2)
        exact = exact | (distance.abs() <= call.window)
    bias = None
    if call.lists is not None:
        exact = exact | call.lists.pairs(length, size)
        bias = call.lists.biases(length, size)
    if call.sink_keys is None:
        return _Columns(key, value, visible, exact, bias)
    sink_key, sink_value, first, _ = call.sink_keys
    sees = (row >= first[:, None])[:, None, None]
    if call.segments is not None:
        sequence = torch.arange(len(first), device=row.device)[:, None, None, None, None]
        sees = sees & (call.segments[:, None] == sequence)
        sees = sees.movedim(0, 3).flatten(3, 4).unsqueeze(0)
        sink_key, sink_value = (
            x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (sink_key, sink_value)
        )
    return _Columns(
        torch.cat((key, sink_key), dim=2),
        torch.cat((value, sink_value), dim=2),
        torch.cat((visible, sees), dim=-1),
        F.pad(exact, (0, sink_key.shape[2]), value=True),
        bias,
    )


def _kernel(call: AttentionCall, columns: _Columns) -> Tensor:
    """``K`` over columns and the features of the state, each row divided by ``e^`` its scale."""
    query, key = call.query.double(), columns.key.double().unsqueeze(2)
    # What all features of a query have in common counts only beside exact pairs.
    base, exponent = _features(call, query, is_query=not call.has_exact_pairs())
    exponent = exponent + math.log(call.form.normalizer)
    key_base, key_exponent = _features(call, key)
    # sum_f phi_f(q_i) phi_f(k_j), divided by the largest features of both.
    row, column = (x.detach().amax(-1, keepdim=True) for x in (exponent, key_exponent))
    factor = (base * (exponent - row).exp()) @ (key_base * (key_exponent - column).exp()).mT
    log = row + column.mT
    if call.form.kind == "exponential":
        # Where these lie too far apart even for float64: feature by feature.
        lost = (factor < _SMALLEST_SAFE_SUM) & columns.visible & ~columns.exact
        batch, head, group, i, j = pair = lost.nonzero(as_tuple=True)
        apart = exponent[batch, head, group, i] + key_exponent[batch, head, 0, j]
        factor, log = factor.masked_fill(lost, 1.0), log.index_put(pair, apart.logsumexp(-1))
    factor = factor.masked_fill(columns.exact, 1.0)
    logits = call.factor * query @ key.mT
    if columns.bias is not None:
        logits = logits + columns.bias.double()
    log = logits.where(columns.exact, log)
    log = log.masked_fill(~columns.visible, -math.inf)
    past = exponent + call.past().log_scale.double()[:, :, None, None]
    factor, log = torch.cat((factor, base), dim=-1), torch.cat((log, past), dim=-1)
    peak = log.detach().amax(-1, keepdim=True)
    return factor * (log - peak.where(peak > -math.inf, 0.0)).exp()


def _features(call: AttentionCall, x: Tensor, *, is_query: bool = False) -> tuple[Tensor, Tensor]:
    """``phi`` of ``(batch, key_heads, groups, T, head_dim)`` as ``base`` and ``exponent``."""
    x = (x * math.sqrt(call.factor)).transpose(1, 2)
    base, exponent = call.form.to(torch.float64).decompose(x, is_query=is_query)
    base = torch.ones_like(x[..., :1]) if base is None else base
    exponent = torch.zeros_like(x[..., :1]) if exponent is None else exponent
    shape = (*x.shape[:-1], call.form.num_features)
    return base.expand(shape).transpose(1, 2), exponent.expand(shape).transpose(1, 2)


def _state(call: AttentionCall, past: FavorState) -> FavorState:
    """The past and all keys but the last ``window``, which stay as they are."""
    kept, mask = max(0, call.key.shape[2] - (call.window or 0)), call.key_mask
    key, value = (masked(x, mask)[:, :, :kept].double() for x in (call.key, call.value))
    base, exponent = (x.squeeze(2) for x in _features(call, key.unsqueeze(2)))
    if mask is not None:
        exponent = exponent.masked_fill(~mask[:, None, :kept, None], -math.inf)
    before = past.log_scale.double()
    log_scale = torch.cat((before.unsqueeze(2), exponent), dim=2).detach().amax(2)
    scale = log_scale.where(log_scale > -math.inf, 0.0)
    features, decay = base * (exponent - scale.unsqueeze(2)).exp(), (before - scale).exp()
    key_value = past.key_value.double() * decay.unsqueeze(-1) + features.mT @ value
    key_sum = past.key_sum.double() * decay + features.sum(2)
    return FavorState(*(x.to(call.dtype) for x in (key_value, key_sum, log_scale)))
