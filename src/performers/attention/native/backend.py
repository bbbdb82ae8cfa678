"""The ``native`` backend: which calls the kernels take, and how they are put to them."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from performers.attention import chunked
from performers.attention.blocks import Features, Rows, divide, merge, normalised_rows
from performers.attention.listed import split_listed
from performers.attention.native.listed import kernel_pairs
from performers.attention.native.operators import favor_forward
from performers.attention.problem import AttentionProblem, SinkKeys
from performers.attention.state import FavorState

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


def _attend_with_lists(problem: AttentionProblem) -> Tensor:
    """Features, exact pairs and listed keys, each by kernels of their own, and joined."""
    exact = problem.window is not None or problem.sinks is not None
    if not exact:
        # The kernels sum the features by themselves only where there are exact pairs: a sink that
        # no query sees.
        problem = problem._replace(sinks=_unseen_sink(problem))
    query = problem.query.double()
    half_norm = query.square().sum(-1, keepdim=True) * problem.scale / 2
    log_factor = math.log(problem.form.normalizer) - half_norm
    far = _rows(problem, "far")
    features = Features(problem.form.to(problem.dtype), math.sqrt(problem.scale), problem.dtype)
    far = far._replace(log_scale=far.log_scale - log_factor)
    rest, listed = split_listed(problem, features, far, kernel_pairs)
    rows = merge(rest._replace(log_scale=rest.log_scale + log_factor), listed, scaled=True)
    if exact:
        rows = merge(rows, _rows(problem, "exact"), scaled=True)
    return divide(rows.numerator, rows.denominator)


def _rows(problem: AttentionProblem, part: str) -> Rows:
    """A part of the pairs, as rows with denominators of one, or zero for rows without a key."""
    out, *_, log_normaliser = favor_forward(*operator_arguments(problem, part))
    return normalised_rows(out, log_normaliser)


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
    form, state, sinks = problem.form, problem.state, problem.sinks
    exponential = form.kind == "exponential"
    # The backward pass computes features again, and must not meet a redrawn projection.
    form = form.to(problem.dtype)
    form = form.copied() if torch.is_grad_enabled() else form
    weight = form.weight
    if weight is None:
        size = problem.key.shape[-1]
        weight = torch.eye(size, dtype=problem.dtype, device=problem.key.device).unsqueeze(0)
    bias = form.bias
    if bias is not None and bias.shape[0] != weight.shape[0]:
        bias = bias.expand(weight.shape[0], -1)
    return (
        problem.query,
        problem.key,
        problem.value,
        weight,
        bias,
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
    return known and not empty and not _is_transformed()


def _is_transformed() -> bool:
    # Custom operators have no derivative inside vmap, grad and their like, nor forward-mode ones,
    # and there is no public way to ask.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
