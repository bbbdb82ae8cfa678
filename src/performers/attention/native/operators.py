"""``performers::favor_forward`` and ``performers::favor_backward``: the kernels as torch operators.

Autograd keeps the inputs, the output, two numbers a row and, for bidirectional calls, the sums over
the keys; features are computed again in the backward pass. All sizes are linear in the length.
Beside exact pairs (a window or sinks) gradients are summed in float32 and converted at the end.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from performers.attention.native.interface import KINDS, PARTS, Call, contiguous
from performers.attention.nonfinite import Touched, touched, zeroed
from performers.attention.problem import AttentionProblem
from performers.features import FeatureForm
from performers.features.form import replaced

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? key_mask, "
    "Tensor? segments, Tensor? past_key_value, Tensor? past_key_sum, Tensor? past_log_scale, "
    "Tensor? sink_key, Tensor? sink_value, Tensor? sink_first, str kind, bool quadratic, "
    "float epsilon, float normalizer, float scale, bool is_causal, int? window, int offset, "
    "str part"
)
_RESULTS = ("out", "row_scale", "row_inverse", "key_value", "key_sum", "log_scale")
_TYPED_RESULTS = ", ".join(f"Tensor {name}" for name in _RESULTS)
_FORWARD = f"({_INPUTS}, bool return_state) -> ({_TYPED_RESULTS}, Tensor log_normaliser)"
_BACKWARD = (
    "(Tensor grad_out, Tensor? grad_key_value, Tensor? grad_key_sum, Tensor? grad_log_normaliser, "
    f"{_INPUTS}, {_TYPED_RESULTS}, "
    "bool trained=False) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
    "Tensor grad_past_key_value, Tensor grad_past_key_sum, Tensor grad_sink_key, "
    "Tensor grad_sink_value, Tensor grad_weight, Tensor grad_bias)"
)
_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, ...]


def kernel_form(problem: AttentionProblem) -> FeatureForm:
    """The feature map of a call as kernels read it: a projection, and a bias as often as that.

    Args:
        problem: The call.
    """
    form = problem.form.to(problem.dtype)
    weight, bias = form.weight, form.bias
    if weight is None:
        size = problem.key.shape[-1]
        weight = torch.eye(size, dtype=problem.dtype, device=problem.key.device).unsqueeze(0)
    if bias is not None and bias.shape[0] != weight.shape[0]:
        bias = bias.expand(weight.shape[0], -1)
    return replaced(form, weight=weight, bias=bias)


class _Inputs(NamedTuple):
    """What both operators are given, in the order of their schemas."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor | None
    key_mask: Tensor | None
    segments: Tensor | None
    past_key_value: Tensor | None
    past_key_sum: Tensor | None
    past_log_scale: Tensor | None
    sink_key: Tensor | None
    sink_value: Tensor | None
    sink_first: Tensor | None
    kind: str
    quadratic: bool
    epsilon: float
    normalizer: float
    scale: float
    is_causal: bool
    window: int | None
    offset: int
    part: str

    def has_exact_pairs(self) -> bool:
        """Whether some pairs are exact, so that several passes share a gradient."""
        return self.window is not None or self.sink_key is not None


_TENSORS = 13
_POINTERS = slice(3, 10)  # what the kernels read contiguously


def _call(inputs: _Inputs) -> tuple[Call, list[Tensor | None]]:
    """A call with its inputs set, and the tensors that its pointers rely on."""
    call = Call()
    weight = inputs.weight
    call.describe(inputs.query, inputs.key, inputs.value, weight.shape[-2], weight.shape[0])
    call.kind, call.quadratic = KINDS[inputs.kind], inputs.quadratic
    call.causal, call.epsilon, call.scale = inputs.is_causal, inputs.epsilon, inputs.scale
    call.window = -1 if inputs.window is None else inputs.window
    call.offset, call.normalizer = inputs.offset, inputs.normalizer
    call.part = PARTS[inputs.part]
    names = (*_Inputs._fields[_POINTERS], "sink_first")
    held = contiguous([getattr(inputs, name) for name in names])
    call.pointers(**dict(zip(names, held, strict=True)))
    if inputs.sink_key is not None and inputs.sink_value is not None:
        call.sinks = inputs.sink_key.shape[2]
        call.arrays(sink_key=inputs.sink_key, sink_value=inputs.sink_value)
    return call, held


def _new_results(inputs: _Inputs, return_state: bool) -> _Results:
    """Empty results: the output in the memory order of the query, rows, sums where there are any.

    A model passes views in which a position's heads lie together; an output of the same order
    joins its heads again without a copy.
    """
    query, value = inputs.query, inputs.value
    batch, key_heads, groups, length, _ = query.shape
    width, features = value.shape[-1], inputs.weight.shape[-2]
    if query.stride(3) > query.stride(2 if groups > 1 else 1):
        out = value.new_empty((batch, length, key_heads, groups, width), dtype=torch.float32)
        out = out.permute(0, 2, 3, 1, 4)
    else:
        out = value.new_empty((batch, key_heads, groups, length, width), dtype=torch.float32)
    whole = inputs.segments is None and inputs.window is None
    keeps_sums = return_state if inputs.is_causal else whole and inputs.part != "exact"
    sums = (batch, key_heads, features) if keeps_sums else (0, 0, 0)
    return (
        out,
        out.new_empty((batch, key_heads, groups, length)),
        out.new_empty((batch, key_heads, groups, length)),
        out.new_empty((*sums, width)),
        out.new_empty(sums),
        out.new_empty(sums),
        out.new_empty((0,) if inputs.part == "whole" else out.shape[:-1], dtype=torch.float64),
    )


@torch.library.custom_op(
    "performers::favor_forward", mutates_args=(), device_types="cpu", schema=_FORWARD
)
def favor_forward(*arguments: Any) -> _Results:
    """Attention of ``AttentionProblem``'s tensors; see ``performers_call`` for the results.

    Of a ``part`` of the pairs ("far", "exact"), the last result is the natural logarithm of each
    row's normaliser, minus infinity for a row without keys: with it parts of a row can be joined.
    It has a gradient.
    """
    inputs = _Inputs(*arguments[:-1])
    results = _new_results(inputs, return_state=arguments[-1])
    if not _run_forward(inputs, results):
        inputs, found = _without_nonfinite(inputs)
        _run_forward(inputs, results)
        _mark(found, results)
    return results


def _run_forward(inputs: _Inputs, results: _Results) -> bool:
    """Fill the results; returns False where NaN or infinity was met and they mean nothing."""
    call, held = _call(inputs)
    out, row_scale, row_inverse, *sums, log_normaliser = results
    call.arrays(out=out)
    call.pointers(row_scale=row_scale, row_inverse=row_inverse)
    if sums[0].numel():
        call.pointers(**dict(zip(("key_value", "key_sum", "log_scale"), sums, strict=True)))
    finite = call.run("forward")
    del held
    if log_normaliser.numel():
        # The inverse is negative for some causal rows, and zero for rows without keys. In double
        # precision, because sums are compared by these.
        log_normaliser.copy_(row_scale).mul_(math.log(2)).sub_(row_inverse.double().abs().log())
        log_normaliser.masked_fill_(row_inverse == 0, -math.inf)
    return finite


def _without_nonfinite(inputs: _Inputs) -> tuple[_Inputs, Touched]:
    """Inputs with zeros for keys and values that hold NaN or infinity, and what sees them."""
    found = touched(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.key_mask,
        inputs.segments,
        inputs.sink_key,
        inputs.sink_value,
        inputs.sink_first,
        is_causal=inputs.is_causal,
        window=inputs.window,
        offset=inputs.offset,
    )
    inputs = inputs._replace(
        query=inputs.query.nan_to_num(0.0, 0.0, 0.0),
        key=zeroed(inputs.key, found.key),
        value=zeroed(inputs.value, found.key),
    )
    if inputs.sink_key is None or inputs.sink_value is None or found.sink is None:
        return inputs, found
    sink_key, sink_value = (zeroed(x, found.sink) for x in (inputs.sink_key, inputs.sink_value))
    return inputs._replace(sink_key=sink_key, sink_value=sink_value), found


def _mark(found: Touched, results: _Results) -> None:
    """Put NaN into results that see some."""
    out, _, row_inverse, key_value, key_sum, _, log_normaliser = results
    for where, marked in (
        (found.rows, (out, row_inverse, log_normaliser)),
        (found.sums, (key_value, key_sum)),
    ):
        for x in marked:
            if x.numel():
                x.masked_fill_(where.view(*where.shape, *[1] * (x.ndim - where.ndim)), math.nan)


@favor_forward.register_fake
def _(*arguments: Any) -> _Results:
    return _new_results(_Inputs(*arguments[:-1]), return_state=arguments[-1])


def _new_gradients(inputs: _Inputs, trained: bool) -> _Gradients:
    past = inputs.query.new_empty((0, 0, 0, 0), dtype=torch.float32)
    if inputs.past_key_value is not None:
        past = inputs.past_key_value.new_empty(inputs.past_key_value.shape)
    sinks = [
        past.new_empty((0,)) if tensor is None else torch.empty_like(tensor)
        for tensor in (inputs.sink_key, inputs.sink_value)
    ]
    return (
        torch.empty_like(inputs.query),
        torch.empty_like(inputs.key),
        torch.empty_like(inputs.value),
        past,
        past.new_empty(past.shape[:-1]),
        *sinks,
        past.new_empty(inputs.weight.shape if trained else (0,)),
        past.new_empty(inputs.weight.shape[:-1] if trained else (0,)),
    )


def _sum_gradients(call: Call, inputs: _Inputs, gradients: _Gradients) -> None:
    """The backward pass where several passes add to one gradient: in float32, then converted."""
    wanted = (*gradients[:3], *gradients[5:7])
    summed = [
        x.zero_() if x.dtype == torch.float32 and x.is_contiguous() else _zeros(x) for x in wanted
    ]
    call.arrays(grad_query=summed[0])
    call.arrays(grad_key=summed[1], grad_value=summed[2])
    call.pointers(grad_sink_key=summed[3], grad_sink_value=summed[4])
    call.run("backward")
    for to, tensor in zip(wanted, summed, strict=True):
        if to is not tensor:
            to.copy_(tensor)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device)


def _split(arguments: tuple[Any, ...]) -> tuple[_Inputs, tuple[Tensor, ...], bool]:
    """What follows the gradients among the arguments of the backward operator."""
    inputs, results = len(_Inputs._fields), len(_RESULTS)
    trained = arguments[inputs + results :]
    return (
        _Inputs(*arguments[:inputs]),
        arguments[inputs : inputs + results],
        bool(trained and trained[0]),
    )


@torch.library.custom_op(
    "performers::favor_backward", mutates_args=(), device_types="cpu", schema=_BACKWARD
)
def favor_backward(
    grad_out: Tensor,
    grad_key_value: Tensor | None,
    grad_key_sum: Tensor | None,
    grad_log_normaliser: Tensor | None,
    *arguments: Any,
) -> _Gradients:
    """Gradients of all inputs that can have one, weight and bias if they are ``trained``.

    The inputs of the forward operator come next, then its results, then ``trained``.
    """
    inputs, (out, *results), trained = _split(arguments)
    if bool(results[1].isnan().any()):
        # The kernels multiply what a row does not see by zero, which NaN outlives.
        inputs, _ = _without_nonfinite(inputs)
    call, held = _call(inputs)
    call.arrays(out=out, grad_out=grad_out)
    has_sums = not inputs.is_causal and results[-1].numel()
    rows = contiguous(results if has_sums else [*results[:2], None, None, None])
    call.pointers(**dict(zip(_RESULTS[1:], rows, strict=True)))
    if grad_log_normaliser is not None:
        grad_log_normaliser = grad_log_normaliser.float()
    final = contiguous((grad_key_value, grad_key_sum, grad_log_normaliser))
    call.pointers(grad_key_value=final[0], grad_key_sum=final[1], grad_log_normaliser=final[2])
    gradients = _new_gradients(inputs, trained)
    if trained:
        call.pointers(grad_weight=gradients[7], grad_bias=gradients[8])
    if inputs.past_key_value is not None:
        call.pointers(grad_past_key_value=gradients[3], grad_past_key_sum=gradients[4])
    if inputs.has_exact_pairs():
        _sum_gradients(call, inputs, gradients)
    else:
        call.arrays(grad_query=gradients[0])
        call.arrays(grad_key=gradients[1], grad_value=gradients[2])
        call.run("backward")
    del held, rows, final
    return gradients


@favor_backward.register_fake
def _(
    grad_out: Tensor,
    grad_key_value: Tensor | None,
    grad_key_sum: Tensor | None,
    grad_log_normaliser: Tensor | None,
    *arguments: Any,
) -> _Gradients:
    inputs, _, trained = _split(arguments)
    return _new_gradients(inputs, trained)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output[:-1])
    ctx.constants = inputs[_TENSORS:-1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Once: under torch.utils.checkpoint a second look is an error.
    saved = ctx.saved_tensors
    inputs, results = _Inputs(*saved[:_TENSORS], *ctx.constants), saved[_TENSORS:]
    out = results[0]
    grad_out, _, _, grad_key_value, grad_key_sum, _, grad_log_normaliser = grads
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    if not inputs.is_causal:
        grad_key_value = grad_key_sum = None
    trained = ctx.needs_input_grad[3:5]
    gradients = favor_backward(
        grad_out,
        grad_key_value,
        grad_key_sum,
        grad_log_normaliser if inputs.part != "whole" else None,
        *inputs,
        *results,
        any(trained),
    )
    weights = [x if wanted else None for x, wanted in zip(gradients[7:], trained, strict=True)]
    past = gradients[3:5] if inputs.past_key_value is not None else (None, None)
    sinks = gradients[5:7] if inputs.sink_key is not None else (None, None)
    return (*gradients[:3], *weights, None, None, *past, None, *sinks, *(None,) * 11)


def refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    """The derivative of a backward operator, which there is none of."""
    raise NotImplementedError(
        "the native kernels have no second derivative; for gradients of gradients pass "
        'backend="torch" to favor_attention, or use performers.use_backend("torch")'
    )


favor_forward.register_autograd(_backward, setup_context=_setup_context)
favor_backward.register_autograd(refuse_second_derivative)
