"""``performers::favor_forward`` and ``favor_backward``: the kernels as torch operators.

Beside exact pairs (a window, sinks, listed keys) gradients are summed in float32 and converted at
the end.
"""

import math

import torch

from performers.attention.native.interface import KINDS, PARTS, Call
from performers.attention.nonfinite import Touched, touched, zeroed
from performers.attention.operators import Gradients, Inputs, Results, Upstream, define

# Gradients that all passes beside exact pairs add to.
_SUMMED = ("query", "key", "value", "sink_key", "sink_value")


def _call(inputs: Inputs) -> Call:
    """A call with its inputs set."""
    if inputs.positions is not None and inputs.part != "exact":
        raise ValueError(f'positions are those of exact pairs alone, got part="{inputs.part}"')
    call = Call()
    query, key, value, weight = inputs[:4]
    call.batch, call.key_heads, call.groups, call.length, call.head_dim = query.shape
    call.size, call.value_dim = value.shape[2:]
    call.weight_heads, call.features, _ = weight.shape
    call.threads = torch.get_num_threads()
    call.arrays(query=query, key=key, value=value)
    call.kind, call.quadratic = KINDS[inputs.kind], inputs.quadratic
    call.causal, call.epsilon, call.scale = inputs.is_causal, inputs.epsilon, inputs.scale
    call.window = -1 if inputs.window is None else inputs.window
    call.offset, call.normalizer = inputs.offset, inputs.normalizer
    call.part = PARTS[inputs.part]
    call.reads(Inputs._fields[3:11], inputs[3:11])
    if inputs.sink_key is not None and inputs.sink_value is not None:
        call.sinks = inputs.sink_key.shape[2]
        call.arrays(sink_key=inputs.sink_key, sink_value=inputs.sink_value)
        call.reads(("sink_first",), (inputs.sink_first,))
    return call


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
    call = _call(inputs)
    call.arrays(out=results.out)
    call.pointers(Results._fields[1:-1], results[1:-1])
    finite = call.run("forward")
    log_normaliser, row_inverse = results.log_normaliser, results.row_inverse
    if log_normaliser.numel():
        # The inverse is negative for some causal rows, and zero for rows without keys. In double
        # precision, because sums are compared by these.
        log_normaliser.copy_(results.row_scale).mul_(math.log(2))
        log_normaliser.sub_(row_inverse.double().abs().log())
        log_normaliser.masked_fill_(row_inverse == 0, -math.inf)
    return finite


def _without_nonfinite(inputs: Inputs) -> tuple[Inputs, Touched]:
    """Inputs with zeros for keys and values that hold NaN or infinity, and what sees them."""
    found = touched(inputs)
    sinks = inputs.sink_keys
    inputs = inputs._replace(
        query=inputs.query.nan_to_num(0.0, 0.0, 0.0),
        key=zeroed(inputs.key, found.key),
        value=zeroed(inputs.value, found.key),
    )
    if sinks is None or found.sink is None:
        return inputs, found
    sink_key, sink_value = (zeroed(x, found.sink) for x in (sinks.key, sinks.value))
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


def _backward(upstream: Upstream, inputs: Inputs, results: Results, trained: bool) -> Gradients:
    """Gradients of all inputs that can have one, weight and bias if they are ``trained``."""
    if bool(results.row_inverse.isnan().any()):
        # The kernels multiply what a row does not see by zero, which NaN outlives.
        inputs, _ = _without_nonfinite(inputs)
    call = _call(inputs)
    call.arrays(out=results.out, grad_out=upstream.grad_out)
    call.reads(Results._fields[1:-1], results[1:-1])
    log_normaliser = upstream.grad_log_normaliser
    if log_normaliser is not None:
        log_normaliser = log_normaliser.float()
    call.reads(Upstream._fields[1:], (*upstream[1:-1], log_normaliser))
    gradients = written = _new_gradients(inputs, trained)
    if inputs.window is not None or inputs.sink_key is not None or inputs.part != "whole":
        summed = {name: getattr(gradients, name) for name in _SUMMED}
        for name, x in summed.items():
            plain = x.dtype == torch.float32 and x.is_contiguous()
            summed[name] = x.zero_() if plain else x.new_zeros(x.shape, dtype=torch.float32)
        written = gradients._replace(**summed)
    query, key, value, *others = written
    call.arrays(grad_query=query, grad_key=key, grad_value=value)
    call.pointers([f"grad_{name}" for name in Gradients._fields[3:]], others)
    call.run("backward")
    for to, x in zip(gradients, written, strict=True):
        if to is not x:
            to.copy_(x)
    return gradients


favor_forward, favor_backward = define(
    "favor", _forward, _backward, _new_results, _new_gradients, "CPU"
)
