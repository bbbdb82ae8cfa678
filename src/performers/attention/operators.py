"""Attention kernels as torch operators: their arguments and results, fakes and autograd.

A backend of fused kernels is two functions, forward and backward, that `define` makes operators of.
Autograd keeps the inputs, the output, two numbers a row and, for bidirectional calls, the sums over
the keys; features are computed again in the backward pass. All sizes are linear in the length.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from performers.attention.call import AttentionCall
from performers.attention.exact_keys.window_and_sinks import SinkKeys
from performers.features import FeatureForm
from performers.features.generalized import FUNCTIONS

_KINDS = (
    (torch.relu, "rectified"),
    (F.relu, "rectified"),
    (torch.abs, "absolute"),
    (torch.sigmoid, "sigmoid"),
    (FUNCTIONS["elu+1"], "elu+1"),
)
_LIBRARY = torch.library.Library("performers", "FRAGMENT")
_ALL_DEVICES = "CompositeExplicitAutograd"


class Inputs(NamedTuple):
    """The arguments of a forward operator, which are among those of the backward operator.

    Tensors come first. ``part`` says which pairs are summed: "whole" for all, "joined" for all of
    a call whose rows are joined with others, "feature" for those through features (a listed key is
    one of them), "exact" for the window and the sinks.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor | None
    key_mask: Tensor | None
    segments: Tensor | None
    positions: Tensor | None
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
        """The arguments for a call that kernels cover."""
        form, state, sinks = call.form, call.state, call.sink_keys
        weight, bias = kernel_weights(call)
        kind = kernel_kind(form)
        assert kind is not None
        return cls(
            query=call.query,
            key=call.key,
            value=call.value,
            weight=weight,
            bias=bias,
            key_mask=call.key_mask,
            segments=call.segments,
            positions=call.positions,
            past_key_value=None if state is None else state.key_value,
            past_key_sum=None if state is None else state.key_sum,
            past_log_scale=None if state is None else state.log_scale.detach(),
            sink_key=None if sinks is None else sinks.key,
            sink_value=None if sinks is None else sinks.value,
            sink_first=None if sinks is None else sinks.first,
            kind=kind,
            quadratic=kind == "exponential" and form.quadratic,
            epsilon=form.epsilon,
            normalizer=form.normalizer,
            scale=call.factor,
            is_causal=call.is_causal,
            window=call.window,
            offset=call.offset,
            part=part,
            return_state=call.return_state,
        )

    @property
    def sink_keys(self) -> SinkKeys | None:
        """The sinks, as a call has them."""
        if self.sink_key is None or self.sink_value is None or self.sink_first is None:
            return None
        return SinkKeys(self.sink_key, self.sink_value, self.sink_first, self.sink_first)


class Results(NamedTuple):
    """The results of a forward operator, which are among the arguments of the backward one.

    But of "whole", ``log_normaliser`` is the natural logarithm of each row's normaliser, minus
    infinity for a row without keys: with it parts of a row can be joined. It has a gradient.
    ``csrc/performers_native.h`` describes the others.
    """

    out: Tensor
    row_scale: Tensor
    row_inverse: Tensor
    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor
    log_normaliser: Tensor


class Upstream(NamedTuple):
    """Gradients of the results of a forward operator, for the backward operator."""

    grad_out: Tensor
    grad_key_value: Tensor | None
    grad_key_sum: Tensor | None
    grad_log_normaliser: Tensor | None


class Gradients(NamedTuple):
    """Results of a backward operator; empty for what there is no gradient of."""

    query: Tensor
    key: Tensor
    value: Tensor
    past_key_value: Tensor
    past_key_sum: Tensor
    sink_key: Tensor
    sink_value: Tensor
    weight: Tensor
    bias: Tensor


def kernel_kind(form: FeatureForm) -> str | None:
    """The function of a form as kernels are told it, None for one that none of them knows."""
    if form.kind == "exponential":
        return "exponential"
    return next((name for function, name in _KINDS if function is form.function), None)


def kernel_weights(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Projection and bias of the feature map as kernels read them, one bias for each projection."""
    weight, bias = call.form.weight, call.form.bias
    if weight is None:
        weight = torch.eye(call.key.shape[-1], device=call.key.device).unsqueeze(0)
    weight = weight.to(call.dtype)
    bias = None if bias is None else bias.to(call.dtype)
    if bias is not None and bias.shape[0] != weight.shape[0]:
        bias = bias.expand(weight.shape[0], -1)
    return weight, bias


def define(
    name: str,
    forward: Callable[[Any], Any],
    backward: Callable[[Any, Any, Any, bool], Any],
    new_results: Callable[[Any], Any],
    new_gradients: Callable[[Any, bool], Any],
    dispatch_key: str = _ALL_DEVICES,
) -> tuple[Any, Any]:
    """The operators ``<name>_forward`` and ``<name>_backward``, the derivative of the first.

    The arguments of an operator are flat, and torch 2.7 compiles no named tuple as one of them: the
    operators have the fields of the named tuples below, one after the other.

    Args:
        name: In the namespace ``performers``.
        forward: From inputs, tensors first, to results.
        backward: From gradients of results (``grad_<result>``), inputs, results and whether
            ``weight`` and ``bias`` are trained, to gradients of inputs (``<input>``).
        new_results: Empty results for inputs, of the shapes that ``forward`` returns.
        new_gradients: Empty gradients for inputs, and whether ``weight`` and ``bias`` are trained.
        dispatch_key: Devices the functions run on.
    """
    inputs, results = get_type_hints(forward).values()
    upstream, _, _, _, gradients = get_type_hints(backward).values()
    tensors = sum(hint in (Tensor, Tensor | None) for hint in get_type_hints(inputs).values())
    arriving = [
        (results._fields.index(field.removeprefix("grad_")), hint is Tensor)
        for field, hint in get_type_hints(upstream).items()
    ]
    # The places of the gradients that inputs have.
    leaving = [
        gradients._fields.index(n) if n in gradients._fields else None for n in inputs._fields
    ]
    weight, bias = (inputs._fields.index(name) for name in ("weight", "bias"))

    def fake_backward(upstream: Any, inputs: Any, results: Any, trained: bool) -> Any:
        return new_gradients(inputs, trained)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.constants = inputs[tensors:]
        ctx.set_materialize_grads(False)

    def derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: under torch.utils.checkpoint a second look is an error.
        saved = ctx.saved_tensors
        output, wanted = saved[tensors:], ctx.needs_input_grad
        arrived = []
        for place, required in arriving:
            grad = grads[place]
            if grad is None and required:
                grad = output[place].new_zeros(()).expand(output[place].shape)
            elif not required and output[place].numel() == 0:
                # A result that the call does not have.
                grad = None
            arrived.append(grad)
        trained = wanted[weight] or wanted[bias]
        found = backward_operator(*arrived, *saved[:tensors], *ctx.constants, *output, trained)
        return tuple(
            found[place] if place is not None and want else None
            for place, want in zip(leaving, wanted, strict=True)
        )

    forward_operator = operator(f"{name}_forward", forward, new_results, dispatch_key)
    backward_operator = operator(f"{name}_backward", backward, fake_backward, dispatch_key)
    for made, formula, setup in (
        (forward_operator, derivative, setup_context),
        (backward_operator, _refuse_second_derivative, None),
    ):
        torch.library.register_autograd(made, formula, setup_context=setup, lib=_LIBRARY)
    return forward_operator, backward_operator


def _refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "fused kernels have no second derivative; for gradients of gradients pass "
        'backend="torch" to favor_attention, or use performers.use_backend("torch")'
    )


def operator(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    dispatch_key: str = _ALL_DEVICES,
) -> Any:
    """An operator of a function of named tuples and booleans, whose schema is inferred."""
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
    # What torch.library.custom_op does, without what it puts around every call.
    _LIBRARY.define(name + torch.library.infer_schema(implementation, mutates_args=()))
    _LIBRARY.impl(name, _disable_dynamo(implementation), dispatch_key)
    made = getattr(torch.ops.performers, name).default
    torch.library.register_fake(made, grouped(fake), lib=_LIBRARY)
    return made
