"""Listed keys: ``performers::listed_forward`` and ``performers::listed_backward``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.attention.native.interface import ListedCall, contiguous
from performers.attention.native.operators import (
    gradients_of,
    kernel_weights,
    operator,
    refuse_second_derivative,
)
from performers.attention.torch_backend.listed import ListedPairs


class ListedInputs(NamedTuple):
    """The arguments of the forward operator, tensors first; see ``performers_listed_call``."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor | None
    row: Tensor
    position: Tensor
    list_begin: Tensor
    hidden: Tensor | None
    scale: float
    length: int
    window: int | None


class ListedResults(NamedTuple):
    """Estimates of pairs and their exact weights, each as rows with a normaliser of their own.

    Rows are normalised, ``(B, H, queries, Dv)``; the logarithms of their normalisers,
    ``(B, H, queries)``, are float64, minus infinity for rows without a pair. Estimates lack the
    factor ``normalizer exp(-scale |q|^2 / 2)``.
    """

    estimate: Tensor
    estimate_log: Tensor
    exact: Tensor
    exact_log: Tensor


class ListedUpstream(NamedTuple):
    """Gradients of the results of the forward operator."""

    grad_estimate: Tensor
    grad_estimate_log: Tensor
    grad_exact: Tensor
    grad_exact_log: Tensor


class ListedGradients(NamedTuple):
    """Results of the backward operator."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor


_TENSORS = ListedInputs._fields.index("scale")


def kernel_rows(call: AttentionCall, pairs: ListedPairs) -> ListedResults:
    """Estimates and exact weights of one round of a call's listed pairs."""
    weight, bias = kernel_weights(call)
    query, key, value = (x.to(call.dtype) for x in (pairs.query, pairs.key, pairs.value))
    inputs = ListedInputs(
        query,
        key,
        value,
        weight,
        bias,
        pairs.row,
        pairs.position,
        pairs.begin,
        pairs.hidden,
        call.factor,
        call.query.shape[-2],
        call.window,
    )
    return ListedResults(*listed_forward(*inputs))


def _call(
    inputs: ListedInputs, upstream: ListedUpstream | None = None
) -> tuple[ListedCall, list[Tensor | None]]:
    """A call with its inputs set, and the tensors that its pointers rely on."""
    call = ListedCall()
    call.batch, call.key_heads, call.queries, call.head_dim = inputs.query.shape
    call.blocks, call.rows = inputs.row.shape[2:]
    call.length, call.window = inputs.length, -1 if inputs.window is None else inputs.window
    call.lists, call.list_keys, call.value_dim = inputs.value.shape[2:]
    call.weight_heads, call.features, _ = inputs.weight.shape
    call.threads, call.scale = torch.get_num_threads(), inputs.scale
    tensors = [getattr(inputs, name) for name in ListedInputs._fields[:_TENSORS]]
    held = contiguous(tensors)
    call.pointers(**dict(zip(ListedInputs._fields, held, strict=False)))
    if upstream is not None:
        floats = contiguous([x.float() for x in upstream])
        call.pointers(**dict(zip(ListedUpstream._fields, floats, strict=True)))
        held += floats
    return call, held


def _new_results(inputs: ListedInputs) -> ListedResults:
    query, width = inputs.query, inputs.value.shape[-1]
    rows = query.shape[:-1]
    return ListedResults(
        query.new_empty((*rows, width)),
        query.new_empty(rows, dtype=torch.float64),
        query.new_empty((*rows, width)),
        query.new_empty(rows, dtype=torch.float64),
    )


def _forward(inputs: ListedInputs) -> ListedResults:
    call, held = _call(inputs)
    results = _new_results(inputs)
    call.pointers(**results._asdict())
    call.run("listed_forward")
    del held
    return results


def _backward(
    upstream: ListedUpstream, inputs: ListedInputs, results: ListedResults, trained: bool
) -> ListedGradients:
    """Gradients of queries, keys and values, of weight and bias if they are ``trained``."""
    call, held = _call(inputs, upstream)
    kept = contiguous(results)
    call.pointers(**dict(zip(ListedResults._fields, kept, strict=True)))
    gradients = _new_gradients(upstream, inputs, results, trained)
    for name in ListedGradients._fields[: 5 if trained else 3]:
        call.pointers(**{f"grad_{name}": getattr(gradients, name)})
    call.run("listed_backward")
    del held, kept
    return gradients


def _new_gradients(
    upstream: ListedUpstream, inputs: ListedInputs, results: ListedResults, trained: bool
) -> ListedGradients:
    query, key, value, weight = inputs[:4]
    # Keys of lists without a query have no gradient.
    return ListedGradients(
        query.new_empty(query.shape),
        key.new_zeros(key.shape),
        value.new_zeros(value.shape),
        weight.new_zeros(weight.shape if trained else (0,)),
        weight.new_zeros(weight.shape[:-1] if trained else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.numbers = inputs[_TENSORS:]


def _derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    wanted = dict(zip(ListedInputs._fields, ctx.needs_input_grad, strict=True))
    gradients = listed_backward(
        *grads,
        *saved[:_TENSORS],
        *ctx.numbers,
        *saved[_TENSORS:],
        wanted["weight"] or wanted["bias"],
    )
    return gradients_of(ListedInputs._fields, wanted, ListedGradients(*gradients))


listed_forward = operator("performers::listed_forward", _forward, _new_results)
listed_backward = operator("performers::listed_backward", _backward, _new_gradients)
listed_forward.register_autograd(_derivative, setup_context=_setup_context)
listed_backward.register_autograd(refuse_second_derivative)
