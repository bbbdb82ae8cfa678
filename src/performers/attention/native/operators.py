"""``performers::favor_forward`` and ``performers::favor_backward``: the kernels as torch operators.

Autograd keeps the inputs, the output, two numbers a row and, for bidirectional calls, the sums over
the keys; features are computed again in the backward pass. All sizes are linear in the length.
Beside exact pairs (a window or sinks) gradients are summed in float32 and converted at the end.
"""

import math
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.attention.exact_keys.window_and_sinks import SinkKeys
from performers.attention.native.interface import KINDS, PARTS, Call, contiguous
from performers.attention.nonfinite import Touched, touched, zeroed


def operator(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    device_types: str | None = "cpu",
) -> Any:
    """A torch operator of a function of named tuples.

    The arguments of an operator are flat, and torch 2.7 compiles no named tuple as one of them: the
    operator has the fields of all of them, one after the other, and ``torch.library`` infers its
    schema from their types.

    Args:
        name: The operator's name.
        function: The implementation; its parameters are named tuples, numbers or
            booleans, and it returns a named tuple of tensors.
        fake: The same with results of the right shapes only.
        device_types: The devices that it runs on, None for all.
    """
    kinds = get_type_hints(function)
    results = kinds.pop("return")._fields
    flat: dict[str, Any] = {}
    spans = []
    for parameter, kind in kinds.items():
        start = len(flat)
        flat.update(get_type_hints(kind) if hasattr(kind, "_fields") else {parameter: kind})
        spans.append((kind if hasattr(kind, "_fields") else None, start, len(flat)))

    def grouped(function: Callable[..., Any]) -> Callable[..., Any]:
        def of_fields(*arguments: Any) -> Any:
            return function(
                *[
                    arguments[start] if kind is None else kind(*arguments[start:stop])
                    for kind, start, stop in spans
                ]
            )

        return of_fields

    implementation = grouped(function)
    implementation.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
            for n, kind in flat.items()
        ],
        return_annotation=tuple[(Tensor,) * len(results)],  # type: ignore[misc]
    )
    made = torch.library.custom_op(name, implementation, mutates_args=(), device_types=device_types)
    made.register_fake(grouped(fake))
    return made


def kernel_weights(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Projection and bias of the feature map as kernels read them, one bias for each projection."""
    form = call.form.to(call.dtype)
    weight, bias = form.weight, form.bias
    if weight is None:
        size = call.key.shape[-1]
        weight = torch.eye(size, dtype=call.dtype, device=call.key.device).unsqueeze(0)
    if bias is not None and bias.shape[0] != weight.shape[0]:
        bias = bias.expand(weight.shape[0], -1)
    return weight, bias


class Inputs(NamedTuple):
    """The arguments of the forward operator, which are among those of the backward operator.

    Tensors come first. ``part`` says which pairs are summed: "whole" for all, "feature" for those
    through features (a listed key is one of them), "exact" for the window and the sinks.
    """

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
    return_state: bool

    @classmethod
    def of(cls, call: AttentionCall, part: str = "whole") -> "Inputs":
        """The arguments for a call that the kernels cover."""
        form, state, sinks = call.form, call.state, call.sink_keys
        weight, bias = kernel_weights(call)
        exponential = form.kind == "exponential"
        derived: dict[str, Any] = {
            "weight": weight,
            "bias": bias,
            "past_key_value": None if state is None else state.key_value,
            "past_key_sum": None if state is None else state.key_sum,
            "past_log_scale": None if state is None else state.log_scale.detach(),
            "sink_key": None if sinks is None else sinks.key,
            "sink_value": None if sinks is None else sinks.value,
            "sink_first": None if sinks is None else sinks.first,
            "kind": "exponential" if exponential else "rectified",
            "quadratic": exponential and form.quadratic,
            "epsilon": form.epsilon,
            "normalizer": form.normalizer,
            "scale": call.factor,
            "part": part,
        }
        given = [derived[n] if n in derived else getattr(call, n) for n in cls._fields]
        return cls(*given)

    @property
    def sink_keys(self) -> SinkKeys | None:
        """The sinks, as a call has them."""
        if self.sink_key is None or self.sink_value is None or self.sink_first is None:
            return None
        return SinkKeys(self.sink_key, self.sink_value, self.sink_first, self.sink_first)

    def has_exact_pairs(self) -> bool:
        """Whether some pairs are exact, so that several passes share a gradient."""
        return self.window is not None or self.sink_key is not None


class Results(NamedTuple):
    """The results of the forward operator; all but the last are arguments of the backward one.

    Of a ``part`` of the pairs, ``log_normaliser`` is the natural logarithm of each row's
    normaliser, minus infinity for a row without keys: with it parts of a row can be joined. It has
    a gradient. ``csrc/performers_native.h`` describes the others.
    """

    out: Tensor
    row_scale: Tensor
    row_inverse: Tensor
    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor
    log_normaliser: Tensor


class Upstream(NamedTuple):
    """Gradients of the results of the forward operator, for the backward operator."""

    grad_out: Tensor
    grad_key_value: Tensor | None
    grad_key_sum: Tensor | None
    grad_log_normaliser: Tensor | None


class Gradients(NamedTuple):
    """Results of the backward operator; empty for what there is no gradient of."""

    query: Tensor
    key: Tensor
    value: Tensor
    past_key_value: Tensor
    past_key_sum: Tensor
    sink_key: Tensor
    sink_value: Tensor
    weight: Tensor
    bias: Tensor


_TENSORS = Inputs._fields.index("kind")
_POINTERS = (*Inputs._fields[3:10], "sink_first")  # what the kernels read contiguously


def _call(inputs: Inputs) -> tuple[Call, list[Tensor | None]]:
    """A call with its inputs set, and the tensors that its pointers rely on."""
    call = Call()
    weight = inputs.weight
    call.describe(inputs.query, inputs.key, inputs.value, weight.shape[-2], weight.shape[0])
    call.kind, call.quadratic = KINDS[inputs.kind], inputs.quadratic
    call.causal, call.epsilon, call.scale = inputs.is_causal, inputs.epsilon, inputs.scale
    call.window = -1 if inputs.window is None else inputs.window
    call.offset, call.normalizer = inputs.offset, inputs.normalizer
    call.part = PARTS[inputs.part]
    held = contiguous([getattr(inputs, name) for name in _POINTERS])
    call.pointers(**dict(zip(_POINTERS, held, strict=True)))
    if inputs.sink_key is not None and inputs.sink_value is not None:
        call.sinks = inputs.sink_key.shape[2]
        call.arrays(sink_key=inputs.sink_key, sink_value=inputs.sink_value)
    return call, held


def _new_results(inputs: Inputs) -> Results:
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
    keeps_sums = inputs.return_state if inputs.is_causal else whole and inputs.part != "exact"
    sums = (batch, key_heads, features) if keeps_sums else (0, 0, 0)
    return Results(
        out,
        out.new_empty((batch, key_heads, groups, length)),
        out.new_empty((batch, key_heads, groups, length)),
        out.new_empty((*sums, width)),
        out.new_empty(sums),
        out.new_empty(sums),
        out.new_empty((0,) if inputs.part == "whole" else out.shape[:-1], dtype=torch.float64),
    )


def _forward(inputs: Inputs) -> Results:
    results = _new_results(inputs)
    if not _run_forward(inputs, results):
        inputs, found = _without_nonfinite(inputs)
        _run_forward(inputs, results)
        _mark(found, results)
    return results


def _run_forward(inputs: Inputs, results: Results) -> bool:
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


def _without_nonfinite(inputs: Inputs) -> tuple[Inputs, Touched]:
    """Inputs with zeros for keys and values that hold NaN or infinity, and what sees them."""
    found = touched(inputs)
    inputs = inputs._replace(
        query=inputs.query.nan_to_num(0.0, 0.0, 0.0),
        key=zeroed(inputs.key, found.key),
        value=zeroed(inputs.value, found.key),
    )
    if inputs.sink_key is None or inputs.sink_value is None or found.sink is None:
        return inputs, found
    sink_key, sink_value = (zeroed(x, found.sink) for x in (inputs.sink_key, inputs.sink_value))
    return inputs._replace(sink_key=sink_key, sink_value=sink_value), found


def _mark(found: Touched, results: Results) -> None:
    """Put NaN into results that see some."""
    out, _, row_inverse, key_value, key_sum, _, log_normaliser = results
    for where, marked in (
        (found.rows, (out, row_inverse, log_normaliser)),
        (found.sums, (key_value, key_sum)),
    ):
        for x in marked:
            if x.numel():
                x.masked_fill_(where.view(*where.shape, *[1] * (x.ndim - where.ndim)), math.nan)


def _new_gradients(inputs: Inputs, trained: bool) -> Gradients:
    past = inputs.query.new_empty((0, 0, 0, 0), dtype=torch.float32)
    if inputs.past_key_value is not None:
        past = inputs.past_key_value.new_empty(inputs.past_key_value.shape)
    sink_key, sink_value = (
        past.new_empty((0,)) if tensor is None else torch.empty_like(tensor)
        for tensor in (inputs.sink_key, inputs.sink_value)
    )
    return Gradients(
        torch.empty_like(inputs.query),
        torch.empty_like(inputs.key),
        torch.empty_like(inputs.value),
        past,
        past.new_empty(past.shape[:-1]),
        sink_key,
        sink_value,
        past.new_empty(inputs.weight.shape if trained else (0,)),
        past.new_empty(inputs.weight.shape[:-1] if trained else (0,)),
    )


def _sum_gradients(call: Call, inputs: Inputs, gradients: Gradients) -> None:
    """The backward pass where several passes add to one gradient: in float32, then converted."""
    wanted = (*gradients[:3], gradients.sink_key, gradients.sink_value)
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


def _backward(upstream: Upstream, inputs: Inputs, results: Results, trained: bool) -> Gradients:
    """Gradients of all inputs that can have one, weight and bias if they are ``trained``."""
    if bool(results.row_inverse.isnan().any()):
        # The kernels multiply what a row does not see by zero, which NaN outlives.
        inputs, _ = _without_nonfinite(inputs)
    call, held = _call(inputs)
    call.arrays(out=results.out, grad_out=upstream.grad_out)
    names = Results._fields[1:-1] if _has_sums(inputs, results) else Results._fields[1:3]
    rows = contiguous([getattr(results, name) for name in names])
    call.pointers(**dict(zip(names, rows, strict=True)))
    log_normaliser = upstream.grad_log_normaliser
    final = contiguous(
        [
            upstream.grad_key_value,
            upstream.grad_key_sum,
            None if log_normaliser is None else log_normaliser.float(),
        ]
    )
    call.pointers(**dict(zip(Upstream._fields[1:], final, strict=True)))
    gradients = _new_gradients(inputs, trained)
    if trained:
        call.pointers(grad_weight=gradients.weight, grad_bias=gradients.bias)
    if inputs.past_key_value is not None:
        call.pointers(
            grad_past_key_value=gradients.past_key_value, grad_past_key_sum=gradients.past_key_sum
        )
    if inputs.has_exact_pairs():
        _sum_gradients(call, inputs, gradients)
    else:
        call.arrays(grad_query=gradients.query)
        call.arrays(grad_key=gradients.key, grad_value=gradients.value)
        call.run("backward")
    del held, rows, final
    return gradients


def _has_sums(inputs: Inputs, results: Results) -> bool:
    return not inputs.is_causal and results.log_scale.numel() > 0


def _fake_backward(
    upstream: Upstream, inputs: Inputs, results: Results, trained: bool
) -> Gradients:
    return _new_gradients(inputs, trained)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.constants = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # Once: under torch.utils.checkpoint a second look is an error.
    saved = ctx.saved_tensors
    inputs, results = Inputs(*saved[:_TENSORS], *ctx.constants), Results(*saved[_TENSORS:])
    given = dict(zip(Results._fields, grads, strict=True))
    grad_out, out = given["out"], results.out
    if grad_out is None:
        grad_out = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
    upstream = Upstream(
        grad_out,
        given["key_value"] if inputs.is_causal else None,
        given["key_sum"] if inputs.is_causal else None,
        given["log_normaliser"] if inputs.part != "whole" else None,
    )
    wanted = dict(zip(Inputs._fields, ctx.needs_input_grad, strict=True))
    trained = wanted["weight"] or wanted["bias"]
    gradients = Gradients(*favor_backward(*upstream, *inputs, *results, trained))
    return gradients_of(Inputs._fields, wanted, gradients)


def gradients_of(
    names: tuple[str, ...], wanted: dict[str, bool], gradients: Any
) -> tuple[Tensor | None, ...]:
    """The gradient of each input, None where none is wanted."""
    return tuple(getattr(gradients, name) if wanted[name] else None for name in names)


def refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    """The derivative of a backward operator, which there is none of."""
    raise NotImplementedError(
        "the kernels have no second derivative; for gradients of gradients pass "
        'backend="torch" to favor_attention, or use performers.use_backend("torch")'
    )


favor_forward = operator("performers::favor_forward", _forward, _new_results)
favor_backward = operator("performers::favor_backward", _backward, _fake_backward)
favor_forward.register_autograd(_derivative, setup_context=_setup_context)
favor_backward.register_autograd(refuse_second_derivative)
