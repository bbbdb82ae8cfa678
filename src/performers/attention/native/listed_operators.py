"""Listed keys: ``performers::listed_forward`` and ``performers::listed_backward``."""

from typing import NamedTuple

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.attention.native.interface import KINDS, ListedCall
from performers.attention.operators import define, kernel_weights
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


def kernel_rows(call: AttentionCall, pairs: ListedPairs) -> ListedResults:
    """Estimates and exact weights of one round of a call's listed pairs."""
    query, key, value = (x.to(call.dtype) for x in (pairs.query, pairs.key, pairs.value))
    inputs = ListedInputs(
        query,
        key,
        value,
        *kernel_weights(call),
        pairs.row,
        pairs.position,
        pairs.begin,
        pairs.hidden,
        call.factor,
        call.query.shape[-2],
        call.window,
    )
    return ListedResults(*listed_forward(*inputs))


def _call(inputs: ListedInputs) -> ListedCall:
    """A call with its inputs set."""
    call = ListedCall()
    query, key, value = inputs[:3]
    call.batch, call.key_heads, queries, call.head_dim = query.shape
    call.groups, call.length = queries // inputs.length, inputs.length
    call.lists, call.size, call.value_dim = value.shape[2:]
    call.weight_heads, call.features, _ = inputs.weight.shape
    call.blocks, call.rows = inputs.row.shape[2:]
    call.kind, call.quadratic, call.normalizer = KINDS["exponential"], True, 1.0
    call.window = -1 if inputs.window is None else inputs.window
    call.threads, call.scale = torch.get_num_threads(), inputs.scale
    call.arrays(query=query, key=key, value=value)
    call.reads(ListedInputs._fields[3:9], inputs[3:9])
    return call


def _new_results(inputs: ListedInputs) -> ListedResults:
    query = inputs.query
    out = query.new_empty((*query.shape[:-1], inputs.value.shape[-1]))
    log = query.new_empty(query.shape[:-1], dtype=torch.float64)
    return ListedResults(out, log, torch.empty_like(out), torch.empty_like(log))


def _forward(inputs: ListedInputs) -> ListedResults:
    call, results = _call(inputs), _new_results(inputs)
    call.pointers(ListedResults._fields, results)
    call.run("listed_forward")
    return results


def _backward(
    upstream: ListedUpstream, inputs: ListedInputs, results: ListedResults, trained: bool
) -> ListedGradients:
    """Gradients of queries, keys and values, of weight and bias if they are ``trained``."""
    call, gradients = _call(inputs), _new_gradients(inputs, trained)
    call.reads(ListedUpstream._fields, [x.float() for x in upstream])
    call.reads(ListedResults._fields, results)
    query, key, value, *others = gradients
    call.arrays(grad_query=query, grad_key=key, grad_value=value)
    call.pointers(["grad_weight", "grad_bias"], others)
    call.run("listed_backward")
    return gradients


def _new_gradients(inputs: ListedInputs, trained: bool) -> ListedGradients:
    query, key, value, weight = inputs[:4]
    # Keys of lists without a query have no gradient.
    return ListedGradients(
        query.new_empty(query.shape),
        key.new_zeros(key.shape),
        value.new_zeros(value.shape),
        weight.new_zeros(weight.shape if trained else (0,)),
        weight.new_zeros(weight.shape[:-1] if trained else (0,)),
    )


listed_forward, listed_backward = define(
    "listed", _forward, _backward, _new_results, _new_gradients, "CPU"
)
