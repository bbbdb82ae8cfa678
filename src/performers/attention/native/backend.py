"""The ``native`` backend: which calls the kernels take, and how they are put to them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention import chunked
from performers.attention.listed import LEAST_REST, listed_pairs
from performers.attention.native.listed_operators import kernel_rows
from performers.attention.native.operators import favor_forward, kernel_form
from performers.attention.problem import AttentionProblem, SinkKeys
from performers.attention.state import FavorState
from performers.features.draws import is_transformed
from performers.features.form import replaced

_RECTIFIERS = (torch.relu, F.relu)


def attend(problem: AttentionProblem) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key.

    The kernels take float32, bfloat16 and float16 on the CPU, with exponential or ReLU features;
    exact pairs (a window, sinks, listed keys) beside exponential ones that estimate softmax. Every
    other call, and those inside transforms of ``torch.func``, go to the ``torch`` backend.

    Args:
        problem: The checked call.

    Returns:
        Output of shape ``(batch, key_heads, groups, L, value_dim)`` in ``problem.dtype``, and the
        state or None.
    """
    if not covers(problem):
        return chunked.attend(problem)
    if problem.lists is not None:
        return _attend_with_lists(problem), None
    out, _, _, *sums, _ = favor_forward(*operator_arguments(problem))
    if not problem.return_state:
        return out, None
    inputs = [problem.key, problem.value, problem.form.weight, problem.form.bias]
    if problem.state is not None:
        inputs += [problem.state.key_value, problem.state.key_sum]
    if not any(tensor is not None and tensor.requires_grad for tensor in inputs):
        # All results of an operator want gradients if one does; these have none to hand on.
        sums = [tensor.detach() for tensor in sums]
    return out, FavorState(sums[0], sums[1], sums[2].detach())


class _Part(NamedTuple):
    """Some pairs of all rows.

    Attributes:
        out: Divided by its own normaliser, ``(B, Hkv, G, L, Dv)``.
        log: Natural logarithm of that, ``(B, Hkv, G, L)``, float64; minus infinity without a pair.
    """

    out: Tensor
    log: Tensor


def _attend_with_lists(problem: AttentionProblem) -> Tensor:
    """Features, exact pairs and listed keys, each by kernels of their own, and joined."""
    exact = problem.window is not None or problem.sinks is not None
    if not exact:
        # The kernels sum the features by themselves only where there are exact pairs: a sink that
        # no query sees.
        problem = replaced(problem, sinks=_unseen_sink(problem))
    squares = problem.query.to(problem.dtype).square()
    log_factor = math.log(problem.form.normalizer) - squares.sum(-1, dtype=torch.float64) * (
        problem.scale / 2
    )
    far = _part(problem, "far")
    estimates, parts = [], [_part(problem, "exact")] if exact else []
    for pairs in listed_pairs(problem):
        rows = [x.unflatten(2, problem.query.shape[2:4]) for x in kernel_rows(problem, pairs)]
        estimates.append(_Part(rows[0], rows[1] + log_factor))
        parts.append(_Part(rows[2], rows[3]))
    return _join(far, estimates, parts)


def _join(far: _Part, estimates: list[_Part], exact: list[_Part]) -> Tensor:
    """``far`` less the estimates that are in it, and the exact parts: rows as they come out."""
    peak = torch.stack([part.log.detach() for part in (far, *exact)]).amax(0)
    peak = peak.where(peak > -math.inf, 0.0)
    weights = [(part.log - peak).exp() for part in (far, *estimates, *exact)]
    count = 1 + len(estimates)
    rest = [weights[0], *(-x for x in weights[1:count])]
    # What is left of a sum after taking away nearly all of it is rounding.
    left = torch.stack([x.detach() for x in rest]).sum(0)
    # Written so that NaN stays.
    known = ~(left <= LEAST_REST * weights[0].detach())
    signed = [*(x.where(known, 0.0) for x in rest), *weights[count:]]
    total = torch.stack(signed).sum(0)
    inverse = 1 / total.where(total != 0, 1.0)
    out: Tensor | None = None
    for part, weight in zip((far, *estimates, *exact), signed, strict=True):
        share = (weight * inverse).to(part.out.dtype).unsqueeze(-1)
        out = part.out * share if out is None else torch.addcmul(out, part.out, share)
    assert out is not None
    return out


def _part(problem: AttentionProblem, part: str) -> _Part:
    out, *_, log_normaliser = favor_forward(*operator_arguments(problem, part))
    return _Part(out, log_normaliser)


def _unseen_sink(problem: AttentionProblem) -> SinkKeys:
    batch, heads, _, head_dim = problem.key.shape
    key = problem.key.new_zeros(batch, heads, 1, head_dim)
    first = torch.full((batch, 1), problem.query.shape[-2], device=key.device)
    value = key.new_zeros(batch, heads, 1, problem.value.shape[-1])
    return SinkKeys(key, value, first, torch.full_like(first, -1))


def operator_arguments(problem: AttentionProblem, part: str = "whole") -> tuple[Any, ...]:
    """The arguments of ``performers::favor_forward`` for a call that the kernels take.

    Args:
        problem: The call.
        part: Which pairs are summed: "whole" for all, "far" for those through features (a listed
            key is one of them), "exact" for the window and the sinks.
    """
    form, state, sinks = kernel_form(problem), problem.state, problem.sinks
    exponential = form.kind == "exponential"
    return (
        problem.query,
        problem.key,
        problem.value,
        form.weight,
        form.bias,
        problem.key_mask,
        problem.segments,
        None if state is None else state.key_value,
        None if state is None else state.key_sum,
        None if state is None else state.log_scale.detach(),
        None if sinks is None else sinks.key,
        None if sinks is None else sinks.value,
        None if sinks is None else sinks.first,
        "exponential" if exponential else "rectified",
        exponential and form.quadratic,
        form.epsilon,
        form.normalizer,
        problem.scale,
        problem.is_causal,
        problem.window,
        problem.offset,
        part,
        problem.return_state,
    )


def covers(problem: AttentionProblem) -> bool:
    """Whether the kernels take the call; see ``attend``."""
    form = problem.form
    if problem.query.device.type != "cpu" or problem.dtype != torch.float32:
        return False
    if form.kind == "exponential":
        known = form.weight is not None and form.epsilon == 0
    else:
        known = form.kind == "elementwise" and form.function in _RECTIFIERS
    empty = 0 in problem.query.shape or 0 in problem.value.shape
    if problem.window is not None or problem.sinks is not None:
        known = known and form.kind == "exponential" and form.quadratic
    # Custom operators have no derivative inside vmap, grad and their like, nor forward-mode ones.
    return known and not empty and not is_transformed()
