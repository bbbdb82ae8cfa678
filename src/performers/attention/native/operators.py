"""``performers::favor_forward`` and ``performers::favor_backward``: the kernels as torch operators.

Autograd keeps the inputs, the output, two numbers a row and, for bidirectional calls, the sums over
the keys; features are computed again in the backward pass. All sizes are linear in the length.
"""

from typing import Any

import torch
from torch import Tensor

from performers.attention.native.interface import KINDS, Call, contiguous

_FORWARD = (
    "(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? key_mask, "
    "Tensor? segments, Tensor? past_key_value, Tensor? past_key_sum, Tensor? past_log_scale, "
    "str kind, bool quadratic, float epsilon, float scale, bool is_causal, bool return_state) -> "
    "(Tensor out, Tensor row_scale, Tensor row_inverse, Tensor key_value, Tensor key_sum, "
    "Tensor log_scale)"
)
_BACKWARD = (
    "(Tensor grad_out, Tensor? grad_key_value, Tensor? grad_key_sum, Tensor query, Tensor key, "
    "Tensor value, Tensor weight, Tensor? bias, Tensor? key_mask, Tensor? segments, "
    "Tensor? past_key_value, Tensor? past_key_sum, Tensor? past_log_scale, Tensor out, "
    "Tensor row_scale, Tensor row_inverse, Tensor key_value, Tensor key_sum, Tensor log_scale, "
    "str kind, bool quadratic, float epsilon, float scale, bool is_causal) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_past_key_value, "
    "Tensor grad_past_key_sum)"
)
_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _new_results(
    query: Tensor,
    value: Tensor,
    weight: Tensor,
    segments: Tensor | None,
    is_causal: bool,
    return_state: bool,
) -> _Results:
    """Empty results: the output in the memory order of the query, rows, sums where there are any.

    A model passes views in which a position's heads lie together; an output of the same order
    joins its heads again without a copy.
    """
    batch, key_heads, groups, length, _ = query.shape
    width, features = value.shape[-1], weight.shape[-2]
    if query.stride(3) > query.stride(2 if groups > 1 else 1):
        out = value.new_empty((batch, length, key_heads, groups, width), dtype=torch.float32)
        out = out.permute(0, 2, 3, 1, 4)
    else:
        out = value.new_empty((batch, key_heads, groups, length, width), dtype=torch.float32)
    keeps_sums = return_state if is_causal else segments is None
    sums = (batch, key_heads, features) if keeps_sums else (0, 0, 0)
    return (
        out,
        out.new_empty((batch, key_heads, groups, length)),
        out.new_empty((batch, key_heads, groups, length)),
        out.new_empty((*sums, width)),
        out.new_empty(sums),
        out.new_empty(sums),
    )


def _described(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    segments: Tensor | None,
    past: tuple[Tensor | None, Tensor | None, Tensor | None],
    kind: str,
    quadratic: bool,
    epsilon: float,
    scale: float,
    is_causal: bool,
) -> tuple[Call, list[Tensor | None]]:
    """A call with its inputs set, and the tensors that its pointers rely on."""
    call = Call()
    call.describe(query, key, value, weight.shape[-2], weight.shape[0])
    call.kind, call.quadratic, call.causal = KINDS[kind], quadratic, is_causal
    call.epsilon, call.scale = epsilon, scale
    inputs = contiguous((weight, bias, key_mask, segments))
    call.pointers(**dict(zip(("weight", "bias", "key_mask", "segments"), inputs, strict=True)))
    sums = contiguous(past)
    names = ("past_key_value", "past_key_sum", "past_log_scale")
    call.pointers(**dict(zip(names, sums, strict=True)))
    return call, inputs + sums


@torch.library.custom_op(
    "performers::favor_forward", mutates_args=(), device_types="cpu", schema=_FORWARD
)
def favor_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    segments: Tensor | None,
    past_key_value: Tensor | None,
    past_key_sum: Tensor | None,
    past_log_scale: Tensor | None,
    kind: str,
    quadratic: bool,
    epsilon: float,
    scale: float,
    is_causal: bool,
    return_state: bool,
) -> _Results:
    """Attention of ``AttentionProblem``'s tensors; see ``performers_call`` for the results."""
    past = (past_key_value, past_key_sum, past_log_scale)
    call, held = _described(
        query,
        key,
        value,
        weight,
        bias,
        key_mask,
        segments,
        past,
        kind,
        quadratic,
        epsilon,
        scale,
        is_causal,
    )
    results = _new_results(query, value, weight, segments, is_causal, return_state)
    out, row_scale, row_inverse, *sums = results
    call.arrays(out=out)
    call.pointers(row_scale=row_scale, row_inverse=row_inverse)
    if sums[0].numel():
        call.pointers(**dict(zip(("key_value", "key_sum", "log_scale"), sums, strict=True)))
    call.run("forward")
    del held
    return results


@favor_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    segments: Tensor | None,
    past_key_value: Tensor | None,
    past_key_sum: Tensor | None,
    past_log_scale: Tensor | None,
    kind: str,
    quadratic: bool,
    epsilon: float,
    scale: float,
    is_causal: bool,
    return_state: bool,
) -> _Results:
    return _new_results(query, value, weight, segments, is_causal, return_state)


def _new_gradients(
    query: Tensor, key: Tensor, value: Tensor, past_key_value: Tensor | None
) -> _Gradients:
    past = query.new_empty((0, 0, 0, 0), dtype=torch.float32)
    if past_key_value is not None:
        past = past_key_value.new_empty(past_key_value.shape)
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
        past,
        past.new_empty(past.shape[:-1]),
    )


@torch.library.custom_op(
    "performers::favor_backward", mutates_args=(), device_types="cpu", schema=_BACKWARD
)
def favor_backward(
    grad_out: Tensor,
    grad_key_value: Tensor | None,
    grad_key_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    segments: Tensor | None,
    past_key_value: Tensor | None,
    past_key_sum: Tensor | None,
    past_log_scale: Tensor | None,
    out: Tensor,
    row_scale: Tensor,
    row_inverse: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    log_scale: Tensor,
    kind: str,
    quadratic: bool,
    epsilon: float,
    scale: float,
    is_causal: bool,
) -> _Gradients:
    """Gradients of query, key, value and the past's sums."""
    past = (past_key_value, past_key_sum, past_log_scale)
    call, held = _described(
        query,
        key,
        value,
        weight,
        bias,
        key_mask,
        segments,
        past,
        kind,
        quadratic,
        epsilon,
        scale,
        is_causal,
    )
    results = contiguous((row_scale, row_inverse, key_value, key_sum, log_scale))
    call.arrays(out=out, grad_out=grad_out)
    call.pointers(row_scale=results[0], row_inverse=results[1])
    if not is_causal and key_value.numel():
        call.pointers(key_value=results[2], key_sum=results[3], log_scale=results[4])
    final = contiguous((grad_key_value, grad_key_sum))
    call.pointers(grad_key_value=final[0], grad_key_sum=final[1])
    gradients = _new_gradients(query, key, value, past_key_value)
    call.arrays(grad_query=gradients[0])
    call.arrays(grad_key=gradients[1], grad_value=gradients[2])
    if past_key_value is not None:
        call.pointers(grad_past_key_value=gradients[3], grad_past_key_sum=gradients[4])
    call.run("backward")
    del held, results, final
    return gradients


@favor_backward.register_fake
def _(
    grad_out: Tensor,
    grad_key_value: Tensor | None,
    grad_key_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    segments: Tensor | None,
    past_key_value: Tensor | None,
    *rest: Any,
) -> _Gradients:
    return _new_gradients(query, key, value, past_key_value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    tensors, (*constants, is_causal, _) = inputs[:10], inputs[10:]
    ctx.save_for_backward(*tensors, *output)
    ctx.constants = (*constants, is_causal)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, *rest = ctx.saved_tensors
    out = rest[7]
    grad_out, _, _, grad_key_value, grad_key_sum, _ = grads
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    if not ctx.constants[-1]:
        grad_key_value = grad_key_sum = None
    gradients = favor_backward(
        grad_out, grad_key_value, grad_key_sum, query, key, value, *rest, *ctx.constants
    )
    past = gradients[3:] if rest[4] is not None else (None, None)
    return (*gradients[:3], None, None, None, None, *past, *(None,) * 7)


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "the native kernels have no second derivative; for gradients of gradients pass "
        'backend="torch" to favor_attention, or use performers.use_backend("torch")'
    )


favor_forward.register_autograd(_backward, setup_context=_setup_context)
favor_backward.register_autograd(_refuse)
