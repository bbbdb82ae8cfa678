"""The ``reference`` backend: attention written down as the mathematics, quadratic, in float64.

Every other backend is tested against this one. For query ``i`` and the keys ``j`` it may see,

    out_i = sum_j K(q_i, k_j) v_j / sum_j K(q_i, k_j),    K(q, k) = sum_f phi_f(q) phi_f(k),

with the whole matrix in memory, and zeros for a query that sees no key. Rows of the matrix are
scaled freely, since the quotient does not change. Keys that are met exactly have
``exp(scale q_i . k_j)`` in place of ``K``; sinks stand in columns of their own, after the keys.
"""

import math

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.attention.nonfinite import without_nonfinite
from performers.attention.state import FavorState

# Below this sum a row may have lost keys to underflow, even in float64.
_SMALLEST_SAFE_SUM = 1e-200

Parts = tuple[Tensor | None, Tensor | None]


def attend(call: AttentionCall) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key.

    Args:
        call: The checked call.

    Returns:
        Output of shape ``(batch, key_heads, groups, L, value_dim)`` in ``call.dtype``, and the
        state or None.
    """
    call, touched = without_nonfinite(call)
    value = _masked(call.value.double(), call)
    kernel, past_features = _whole_kernel(call)
    numerator = kernel @ _with_sinks(value, call, "value").unsqueeze(2)
    total = kernel.sum(-1, keepdim=True)
    if past_features is not None:
        assert call.state is not None
        numerator = numerator + past_features @ call.state.key_value.double().unsqueeze(2)
        total = total + _past_sum(past_features, call.state)
    out = numerator / total.where(total != 0, 1.0)
    out = out.to(call.dtype)
    state = _final_state(call, value) if call.return_state else None
    return (out, state) if touched is None else touched.marked(out, state)


def attention_matrix(call: AttentionCall) -> Tensor:
    """The row-normalised matrix, shape ``(batch, key_heads, groups, L, S)``, float64.

    For calls without packed sequences.
    """
    call, touched = without_nonfinite(call)
    kernel, _ = _whole_kernel(call)
    size = call.key.shape[2]
    if size == 0:
        return kernel[..., :0]
    if call.sink_keys is not None:
        # Back to where the sinks stand among the keys.
        index = call.sink_keys.place[:, None, None, None, :]
        columns = kernel[..., size:].where(index >= 0, 0.0)
        places = index.clamp_min(0).expand_as(columns)
        kernel = kernel[..., :size].scatter_add(-1, places, columns)
    total = kernel.sum(-1, keepdim=True)
    weights = kernel / total.where(total != 0, 1.0)
    return weights if touched is None else touched.marked(weights, None)[0]


def _whole_kernel(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """The matrix of keys and sinks, and query features for the past's sums."""
    if not call.has_exact_pairs():
        kernel, past_features, _ = _kernel(call, _allowed(call))
        return kernel, past_features
    allowed, near = _allowed(call), _near(call)
    kernel, past_features, log_scale = _kernel(call, allowed & ~near)
    query = call.query.double()
    half_norm = query.square().sum(-1, keepdim=True) * call.factor / 2
    sign = 1 if call.form.kind == "trigonometric" else -1
    log_scale = log_scale + sign * half_norm + math.log(call.form.normalizer)
    key = _masked(call.key.double(), call)
    logs = call.factor * query @ key.unsqueeze(2).mT
    logs = logs.masked_fill(~(allowed & near), -math.inf)
    if call.sink_keys is not None:
        sink_logs, seen = _sink_logs(call, query)
        logs = torch.cat((logs, sink_logs.masked_fill(~seen, -math.inf)), dim=-1)
        kernel = torch.cat((kernel, torch.zeros_like(sink_logs)), dim=-1)
    total = kernel.detach().abs().sum(-1, keepdim=True)
    if past_features is not None:
        assert call.state is not None
        total = total + _past_sum(past_features, call.state).detach().abs()
    far_log = (log_scale.detach() + total.log()).where(total > 0, -math.inf)
    peak = _finite(torch.maximum(far_log, _peak(logs)))
    # A row without far keys has a scale that means nothing.
    share = (log_scale - peak).masked_fill(total == 0, -math.inf).exp()
    past_features = None if past_features is None else past_features * share
    return kernel * share + (logs - peak).exp(), past_features


def _near(call: AttentionCall) -> Tensor:
    """Which pairs are exact, shape ``(L, S)`` or ``(batch, key_heads, groups, L, S)``."""
    length, size = call.query.shape[-2], call.key.shape[-2]
    device = call.query.device
    near = torch.zeros(length, size, dtype=torch.bool, device=device)
    if call.window is not None:
        here = torch.arange(length, device=device)[:, None] + call.offset
        near = (here - torch.arange(size, device=device)).abs() <= call.window
    if call.lists is not None:
        for key, taken, of_query in zip(*call.lists, strict=True):
            # One column more than there are keys takes the places that are not taken.
            member = near.new_zeros(*key.shape[:3], size + 1)
            member = member.scatter(3, key.where(taken, size), True)[..., :size]
            rows = of_query.flatten(2).unsqueeze(-1).expand(-1, -1, -1, size)
            near = near | member.gather(2, rows).unflatten(2, of_query.shape[2:])
    return near


def _sink_logs(call: AttentionCall, query: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``(batch, key_heads, groups, L, columns)`` of all sinks, and which are seen."""
    assert call.sink_keys is not None
    first = call.sink_keys.first
    key = _with_sinks(None, call, "key")
    rows = torch.arange(query.shape[-2], device=query.device)[:, None]
    if call.segments is None:
        seen = (rows >= first[:, None])[:, None, None]
    else:
        sequences = torch.arange(len(first), device=query.device).repeat_interleave(first.shape[1])
        seen = (rows >= first.flatten()) & (call.segments[:, None] == sequences)
    return call.factor * query @ key.unsqueeze(2).mT, seen


def _with_sinks(x: Tensor | None, call: AttentionCall, field: str) -> Tensor:
    """Keys or values followed by the sinks': ``(batch, key_heads, S + columns, D)``."""
    if call.sink_keys is None:
        assert x is not None
        return x
    sinks: Tensor = getattr(call.sink_keys, field).double()
    if call.segments is not None:
        sinks = sinks.movedim(0, 1).flatten(1, 2).unsqueeze(0)
    return sinks if x is None else torch.cat((x, sinks), dim=2)


def _kernel(call: AttentionCall, allowed: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The kernel matrix, zero where not allowed, query features for the past's sums, log scales.

    Both stand divided by ``e^`` the last, ``(batch, key_heads, groups, L, 1)``.
    """
    (query_base, query_exponent), (key_base, key_exponent) = _features(call)
    past = call.state
    if key_exponent is None:
        assert query_base is not None
        assert key_base is not None
        kernel = (query_base @ key_base.unsqueeze(2).transpose(-1, -2)).where(allowed, 0.0)
        return kernel, None if past is None else query_base, kernel.new_zeros(())
    if key_base is not None:
        assert query_base is not None
        return _trigonometric_kernel(query_base, key_base, key_exponent, allowed, past)
    assert query_exponent is not None
    return _exponential_kernel(query_exponent, key_exponent, allowed, past)


def _trigonometric_kernel(
    query_base: Tensor,
    key_base: Tensor,
    key_exponent: Tensor,
    allowed: Tensor,
    past: FavorState | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    logs = key_exponent.squeeze(-1)[:, :, None, None, :].masked_fill(~allowed, -math.inf)
    peak = _peak(logs)
    if past is not None:
        past_log = past.log_scale.double()[:, :, None, None, :]
        peak = torch.maximum(peak, _peak(past_log))
    peak = _finite(peak)
    kernel = (query_base @ key_base.unsqueeze(2).transpose(-1, -2)) * (logs - peak).exp()
    return kernel, None if past is None else query_base * (past_log - peak).exp(), peak


def _exponential_kernel(
    query_exponent: Tensor, key_exponent: Tensor, allowed: Tensor, past: FavorState | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``sum_f exp(a_if + b_jf)``, each row divided by its largest feature's share.

    The features are multiplied out with one scale per feature, that of all keys. A causal row
    whose own keys lie so far below it that they vanish is computed again, pair by pair.
    """
    seen = key_exponent.masked_fill(~allowed.any(-2).any(2).unsqueeze(-1), -math.inf)
    scale = _peak(seen, dim=-2)
    if past is not None:
        scale = torch.maximum(scale, past.log_scale.double().unsqueeze(-2))
    scale = _finite(scale)
    left = query_exponent + scale.unsqueeze(2)
    log_scale = _peak(left)
    left = (left - log_scale).exp()
    right = (seen - scale).exp()
    kernel = (left @ right.unsqueeze(2).transpose(-1, -2)).where(allowed, 0.0)
    total = kernel.detach().sum(-1)
    past_features = None
    if past is not None:
        past_features = left * (past.log_scale.double().unsqueeze(-2) - scale).exp().unsqueeze(2)
        total = total + _past_sum(past_features, past).squeeze(-1)
    has_keys = allowed.any(-1) if past is None else torch.ones_like(total, dtype=torch.bool)
    lost = (total < _SMALLEST_SAFE_SUM) & has_keys
    log_scale = log_scale.clone()
    for batch, head, group, row in lost.nonzero().tolist():
        logs = torch.logsumexp(
            query_exponent[batch, head, group, row] + key_exponent[batch, head], -1
        )
        logs = logs.masked_fill(~allowed.expand_as(kernel)[batch, head, group, row], -math.inf)
        peak = _peak(logs)
        if past is not None and past_features is not None:
            past_logs = query_exponent[batch, head, group, row] + past.log_scale[batch, head]
            peak = torch.maximum(peak, _peak(past_logs))
            past_features[batch, head, group, row] = (past_logs - _finite(peak)).exp()
        kernel[batch, head, group, row] = (logs - _finite(peak)).exp()
        log_scale[batch, head, group, row] = _finite(peak)
    return kernel, past_features, log_scale


def _features(call: AttentionCall) -> tuple[Parts, Parts]:
    form = call.form.to(torch.float64)
    root = math.sqrt(call.factor)
    groups, length = call.query.shape[2:4]
    query = call.query.double().flatten(2, 3) * root
    base, exponent = form.decompose(query, is_query=True)
    base = None if base is None else base.unflatten(2, (groups, length))
    exponent = None if exponent is None else exponent.unflatten(2, (groups, length))
    key = _masked(call.key.double(), call) * root
    return (base, exponent), form.decompose(key, is_query=False)


def _masked(x: Tensor, call: AttentionCall) -> Tensor:
    """Keys or values with zeros in place of those that take no part, whatever they hold."""
    if call.key_mask is None:
        return x
    return x.where(call.key_mask[:, None, :, None], 0.0)


def _allowed(call: AttentionCall) -> Tensor:
    """Which query sees which key, shape ``(batch or 1, 1, 1, L, S)``."""
    length, size = call.query.shape[-2], call.key.shape[-2]
    allowed = torch.ones(length, size, dtype=torch.bool, device=call.query.device)
    if call.is_causal:
        allowed = allowed.tril(call.offset)
    if call.segments is not None:
        allowed = allowed & (call.segments[:, None] == call.segments)
    allowed = allowed[None, None, None]
    if call.key_mask is not None:
        allowed = allowed & call.key_mask[:, None, None, None, :]
    return allowed


def _past_sum(past_features: Tensor, past: FavorState) -> Tensor:
    return past_features @ past.key_sum.double()[:, :, None, :, None]


def _peak(x: Tensor, dim: int = -1) -> Tensor:
    """The maximum along ``dim``, kept, outside the graph; minus infinity of nothing."""
    if x.shape[dim] == 0:
        shape = list(x.shape)
        shape[dim] = 1
        return x.new_full(shape, -math.inf)
    return x.detach().amax(dim, keepdim=True)


def _finite(scale: Tensor) -> Tensor:
    return scale.where(scale > -math.inf, 0.0)


def _final_state(call: AttentionCall, value: Tensor) -> FavorState:
    _, (base, exponent) = _features(call)
    past = call.state
    # The last keys stay as they are.
    batch, heads, size = call.key.shape[:3]
    kept = max(0, size - (call.window or 0))
    value = value[:, :, :kept]
    mask = None if call.key_mask is None else call.key_mask[:, :kept]
    shape = (batch, heads, kept, call.form.num_features)
    if exponent is None:
        assert base is not None
        features = base[:, :, :kept]
        features = features if mask is None else features.where(mask[:, None, :, None], 0.0)
        log_scale = features.new_zeros(batch, heads, shape[-1])
        decay = torch.ones_like(log_scale)
    else:
        exponent = exponent[:, :, :kept].expand(shape)
        if mask is not None:
            exponent = exponent.masked_fill(~mask[:, None, :, None], -math.inf)
        peak = _peak(exponent, dim=-2).squeeze(-2)
        log_scale = peak if past is None else torch.maximum(peak, past.log_scale.double())
        features = (exponent - _finite(log_scale).unsqueeze(-2)).exp()
        features = features if base is None else features * base[:, :, :kept]
        if past is not None:
            decay = (past.log_scale.double() - _finite(log_scale)).exp()
    key_value = features.transpose(-1, -2) @ value
    key_sum = features.sum(-2)
    if past is not None:
        key_value = key_value + past.key_value.double() * decay.unsqueeze(-1)
        key_sum = key_sum + past.key_sum.double() * decay
    return FavorState(*(x.to(call.dtype) for x in (key_value, key_sum, log_scale)))
