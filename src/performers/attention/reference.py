"""The ``reference`` backend: attention written down as the mathematics, quadratic, in float64.

Every other backend is tested against this one. For query ``i`` and the keys ``j`` it may see,

    out_i = sum_j K(q_i, k_j) v_j / sum_j K(q_i, k_j),    K(q, k) = sum_f phi_f(q) phi_f(k),

with the whole matrix in memory, and zeros for a query that sees no key. Rows of the matrix are
scaled freely, since the quotient does not change.
"""

import math

import torch
from torch import Tensor

from performers.attention.problem import AttentionProblem
from performers.attention.state import FavorState

# Below this sum a row may have lost keys to underflow, even in float64.
_SMALLEST_SAFE_SUM = 1e-200

Parts = tuple[Tensor | None, Tensor | None]


def attend(problem: AttentionProblem) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key.

    Args:
        problem: The checked call.

    Returns:
        Output of shape ``(batch, key_heads, groups, L, value_dim)`` in ``problem.dtype``, and the
        state or None.
    """
    value = _masked(problem.value.double(), problem)
    kernel, past_features = _kernel(problem)
    numerator = kernel @ value.unsqueeze(2)
    total = kernel.sum(-1, keepdim=True)
    if past_features is not None:
        assert problem.state is not None
        numerator = numerator + past_features @ problem.state.key_value.double().unsqueeze(2)
        total = total + _past_sum(past_features, problem.state)
    out = numerator / total.where(total != 0, 1.0)
    state = _final_state(problem, value) if problem.return_state else None
    return out.to(problem.dtype), state


def attention_matrix(problem: AttentionProblem) -> Tensor:
    """The row-normalised matrix, shape ``(batch, key_heads, groups, L, S)``, float64."""
    kernel, _ = _kernel(problem)
    total = kernel.sum(-1, keepdim=True)
    return kernel / total.where(total != 0, 1.0)


def _kernel(problem: AttentionProblem) -> tuple[Tensor, Tensor | None]:
    """The kernel matrix, zero where a key is not seen, and query features for the past's sums."""
    (query_base, query_exponent), (key_base, key_exponent) = _features(problem)
    allowed = _allowed(problem)
    past = problem.state
    if key_exponent is None:
        assert query_base is not None
        assert key_base is not None
        kernel = (query_base @ key_base.unsqueeze(2).transpose(-1, -2)).where(allowed, 0.0)
        return kernel, None if past is None else query_base
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
) -> tuple[Tensor, Tensor | None]:
    logs = key_exponent.squeeze(-1)[:, :, None, None, :].masked_fill(~allowed, -math.inf)
    peak = _peak(logs)
    if past is not None:
        past_log = past.log_scale.double()[:, :, None, None, :]
        peak = torch.maximum(peak, _peak(past_log))
    peak = _finite(peak)
    kernel = (query_base @ key_base.unsqueeze(2).transpose(-1, -2)) * (logs - peak).exp()
    return kernel, None if past is None else query_base * (past_log - peak).exp()


def _exponential_kernel(
    query_exponent: Tensor, key_exponent: Tensor, allowed: Tensor, past: FavorState | None
) -> tuple[Tensor, Tensor | None]:
    """``sum_f exp(a_if + b_jf)``, each row divided by its largest feature's share.

    The features are multiplied out with one scale per feature, that of all keys. A causal row
    whose own keys lie so far below it that they vanish is computed again, pair by pair.
    """
    seen = key_exponent.masked_fill(~allowed.any(-2)[:, :, 0, :, None], -math.inf)
    scale = _peak(seen, dim=-2)
    if past is not None:
        scale = torch.maximum(scale, past.log_scale.double().unsqueeze(-2))
    scale = _finite(scale)
    left = query_exponent + scale.unsqueeze(2)
    left = (left - _peak(left)).exp()
    right = (seen - scale).exp()
    kernel = (left @ right.unsqueeze(2).transpose(-1, -2)).where(allowed, 0.0)
    total = kernel.detach().sum(-1)
    past_features = None
    if past is not None:
        past_features = left * (past.log_scale.double().unsqueeze(-2) - scale).exp().unsqueeze(2)
        total = total + _past_sum(past_features, past).squeeze(-1)
    has_keys = allowed.any(-1) if past is None else torch.ones_like(total, dtype=torch.bool)
    lost = (total < _SMALLEST_SAFE_SUM) & has_keys
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
    return kernel, past_features


def _features(problem: AttentionProblem) -> tuple[Parts, Parts]:
    form = problem.form.to(torch.float64)
    root = math.sqrt(problem.scale)
    groups, length = problem.query.shape[2:4]
    query = problem.query.double().flatten(2, 3) * root
    base, exponent = form.decompose(query, is_query=True)
    base = None if base is None else base.unflatten(2, (groups, length))
    exponent = None if exponent is None else exponent.unflatten(2, (groups, length))
    key = _masked(problem.key.double(), problem) * root
    return (base, exponent), form.decompose(key, is_query=False)


def _masked(x: Tensor, problem: AttentionProblem) -> Tensor:
    """Keys or values with zeros in place of those that take no part, whatever they hold."""
    if problem.key_mask is None:
        return x
    return x.where(problem.key_mask[:, None, :, None], 0.0)


def _allowed(problem: AttentionProblem) -> Tensor:
    """Which query sees which key, shape ``(batch or 1, 1, 1, L, S)``."""
    length, size = problem.query.shape[-2], problem.key.shape[-2]
    allowed = torch.ones(length, size, dtype=torch.bool, device=problem.query.device)
    if problem.is_causal:
        allowed = allowed.tril()
    if problem.segments is not None:
        allowed = allowed & (problem.segments[:, None] == problem.segments)
    allowed = allowed[None, None, None]
    if problem.key_mask is not None:
        allowed = allowed & problem.key_mask[:, None, None, None, :]
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


def _final_state(problem: AttentionProblem, value: Tensor) -> FavorState:
    _, (base, exponent) = _features(problem)
    past = problem.state
    batch, heads, size = problem.key.shape[:3]
    shape = (batch, heads, size, problem.form.num_features)
    if exponent is None:
        assert base is not None
        features = _masked(base, problem)
        log_scale = features.new_zeros(batch, heads, shape[-1])
        decay = torch.ones_like(log_scale)
    else:
        exponent = exponent.expand(shape)
        if problem.key_mask is not None:
            exponent = exponent.masked_fill(~problem.key_mask[:, None, :, None], -math.inf)
        peak = _peak(exponent, dim=-2).squeeze(-2)
        log_scale = peak if past is None else torch.maximum(peak, past.log_scale.double())
        features = (exponent - _finite(log_scale).unsqueeze(-2)).exp()
        features = features if base is None else features * base
        if past is not None:
            decay = (past.log_scale.double() - _finite(log_scale)).exp()
    key_value = features.transpose(-1, -2) @ value
    key_sum = features.sum(-2)
    if past is not None:
        key_value = key_value + past.key_value.double() * decay.unsqueeze(-1)
        key_sum = key_sum + past.key_sum.double() * decay
    return FavorState(*(x.to(problem.dtype) for x in (key_value, key_sum, log_scale)))
