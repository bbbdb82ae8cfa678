"""Listed keys: ``performers::listed_forward`` and ``performers::listed_backward``."""

from typing import Any

import torch
from torch import Tensor

from performers.attention.listed import ListedPairs
from performers.attention.native.interface import ListedCall, contiguous
from performers.attention.native.operators import kernel_form, refuse_second_derivative
from performers.attention.problem import AttentionProblem

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor row, "
    "Tensor position, Tensor list_begin, Tensor? hidden, float scale, int length, int? window"
)
_RESULTS = ("estimate", "estimate_log", "exact", "exact_log")
_TYPED_RESULTS = ", ".join(f"Tensor {name}" for name in _RESULTS)
_GRADS = ", ".join(f"Tensor grad_{name}" for name in _RESULTS)
_TENSORS, _NUMBERS = 9, 3
_Results = tuple[Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def kernel_rows(
    problem: AttentionProblem, pairs: ListedPairs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Estimates of the pairs and their exact weights, each as rows with a normaliser of their own.

    Args:
        problem: The call.
        pairs: One round of its pairs.

    Returns:
        For the estimates, without the factor ``normalizer exp(-scale |q|^2 / 2)``: normalised rows
        ``(B, H, queries, Dv)`` and the logarithms of their normalisers ``(B, H, queries)``,
        float64, minus infinity for rows without a pair; the same for the exact weights.
    """
    form = kernel_form(problem)
    rows: tuple[Tensor, Tensor, Tensor, Tensor] = listed_forward(
        *(x.to(problem.dtype) for x in (pairs.query, pairs.key, pairs.value)),
        form.weight,
        form.bias,
        pairs.row,
        pairs.position,
        pairs.begin,
        pairs.hidden,
        problem.scale,
        problem.query.shape[-2],
        problem.window,
    )
    return rows


def _call(
    inputs: tuple[Any, ...], grads: tuple[Tensor, ...] = ()
) -> tuple[ListedCall, list[Tensor | None]]:
    """A call with its inputs set, and the tensors that its pointers rely on."""
    *tensors, scale, length, window = inputs
    held = contiguous((*tensors, *grads))
    query, _, value, weight = tensors[:4]
    call = ListedCall()
    call.batch, call.key_heads, call.queries, call.head_dim = query.shape
    call.blocks, call.rows = tensors[5].shape[2:]
    call.length, call.window = length, -1 if window is None else window
    call.lists, call.list_keys, call.value_dim = value.shape[2:]
    call.weight_heads, call.features, _ = weight.shape
    call.threads, call.scale = torch.get_num_threads(), scale
    names = ("query", "key", "value", "weight", "bias", "row", "position", "list_begin", "hidden")
    grad_names = tuple(f"grad_{name}" for name in _RESULTS)
    call.pointers(**dict(zip((*names, *grad_names[: len(grads)]), held, strict=True)))
    return call, held


def _new_results(query: Tensor, value: Tensor) -> _Results:
    rows = query.shape[:-1]
    return (
        query.new_empty((*rows, value.shape[-1])),
        query.new_empty(rows, dtype=torch.float64),
        query.new_empty((*rows, value.shape[-1])),
        query.new_empty(rows, dtype=torch.float64),
    )


@torch.library.custom_op(
    "performers::listed_forward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_INPUTS}) -> ({_TYPED_RESULTS})",
)
def listed_forward(*inputs: Any) -> _Results:
    """Estimates and exact weights of ``ListedPairs``; see ``performers_listed_call``."""
    call, held = _call(inputs)
    results = _new_results(inputs[0], inputs[2])
    call.pointers(**dict(zip(_RESULTS, results, strict=True)))
    call.run("listed_forward")
    del held
    return results


@listed_forward.register_fake
def _(*inputs: Any) -> _Results:
    return _new_results(inputs[0], inputs[2])


@torch.library.custom_op(
    "performers::listed_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_GRADS}, {_INPUTS}, {_TYPED_RESULTS}, bool trained) -> (Tensor grad_query, "
    "Tensor grad_key, Tensor grad_value, Tensor grad_weight, Tensor grad_bias)",
)
def listed_backward(*arguments: Any) -> _Gradients:
    """Gradients of queries, keys and values, of weight and bias if they are ``trained``."""
    grads = tuple(x.float() for x in arguments[:4])
    inputs = arguments[4 : 4 + _TENSORS + _NUMBERS]
    results, trained = contiguous(arguments[4 + _TENSORS + _NUMBERS : -1]), arguments[-1]
    call, held = _call(inputs, grads)
    call.pointers(**dict(zip(_RESULTS, results, strict=True)))
    gradients = _new_gradients(inputs, trained)
    names = ("grad_query", "grad_key", "grad_value", "grad_weight", "grad_bias")
    call.pointers(**dict(zip(names[: 5 if trained else 3], gradients, strict=False)))
    call.run("listed_backward")
    del held, results
    return gradients


@listed_backward.register_fake
def _(*arguments: Any) -> _Gradients:
    return _new_gradients(arguments[4 : 4 + _TENSORS + _NUMBERS], arguments[-1])


def _new_gradients(inputs: tuple[Any, ...], trained: bool) -> _Gradients:
    query, key, value, weight = inputs[:4]
    # Keys of lists without a query have no gradient.
    return (
        query.new_empty(query.shape),
        key.new_zeros(key.shape),
        value.new_zeros(value.shape),
        weight.new_zeros(weight.shape if trained else (0,)),
        weight.new_zeros(weight.shape[:-1] if trained else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.numbers = inputs[_TENSORS:]


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    trained = ctx.needs_input_grad[3:5]
    gradients = listed_backward(
        *grads, *saved[:_TENSORS], *ctx.numbers, *saved[_TENSORS:], any(trained)
    )
    weights = [x if wanted else None for x, wanted in zip(gradients[3:], trained, strict=True)]
    return (*gradients[:3], *weights, *(None,) * (_TENSORS - 5 + _NUMBERS))


listed_forward.register_autograd(_backward, setup_context=_setup_context)
listed_backward.register_autograd(refuse_second_derivative)
