"""The ``native`` backend: which calls the kernels take, and how they are put to them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from performers.attention import chunked
from performers.attention.native.operators import favor_forward
from performers.attention.problem import AttentionProblem
from performers.attention.state import FavorState

_RECTIFIERS = (torch.relu, F.relu)


def attend(problem: AttentionProblem) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key.

    The kernels take float32, bfloat16 and float16 on the CPU, with exponential or ReLU features;
    exact pairs (a window, sinks) beside exponential ones that estimate softmax. Every other call,
    and those inside transforms of ``torch.func``, go to the ``torch`` backend.

    Args:
        problem: The checked call.

    Returns:
        Output of shape ``(batch, key_heads, groups, L, value_dim)`` in ``problem.dtype``, and the
        state or None.
    """
    if not covers(problem):
        return chunked.attend(problem)
    out, _, _, *sums = favor_forward(*operator_arguments(problem))
    if not problem.return_state:
        return out, None
    inputs = [problem.key, problem.value, problem.form.weight, problem.form.bias]
    if problem.state is not None:
        inputs += [problem.state.key_value, problem.state.key_sum]
    if not any(tensor is not None and tensor.requires_grad for tensor in inputs):
        # All results of an operator want gradients if one does; these have none to hand on.
        sums = [tensor.detach() for tensor in sums]
    return out, FavorState(sums[0], sums[1], sums[2].detach())


def operator_arguments(problem: AttentionProblem) -> tuple[Any, ...]:
    """The arguments of ``performers::favor_forward`` for a call that the kernels take."""
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
    return known and not empty and problem.lists is None and not _is_transformed()


def _is_transformed() -> bool:
    # Custom operators have no derivative inside vmap, grad and their like, nor forward-mode ones,
    # and there is no public way to ask.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
