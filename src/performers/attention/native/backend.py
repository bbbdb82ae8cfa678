"""The ``native`` backend: which calls the kernels take, and how they are put to them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.attention.exact_keys.neighbours import NeighbourLists
from performers.attention.native.listed_operators import kernel_rows
from performers.attention.native.operators import favor_forward
from performers.attention.operators import Inputs, kernel_kind
from performers.attention.state import FavorState
from performers.attention.torch_backend import backend as torch_backend
from performers.attention.torch_backend.blocks import Features, Rows
from performers.attention.torch_backend.listed import LEAST_REST, listed_pairs
from performers.attention.torch_backend.neighbours import neighbour_rows
from performers.attention.torch_backend.positions import (
    coordinates,
    end_to_end,
    in_batch,
    keys_after_window,
    selected,
)
from performers.features.precision import without_autocast
from performers.features.recomputation import is_traced, is_transformed


def attend(call: AttentionCall) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key; see ``Backend``."""
    if 0 in call.query.shape or 0 in call.value.shape:
        # Nothing is summed: zeros of the right shapes, and their graph.
        return torch_backend.attend(call)
    if call.lists is not None:
        return _attend_with_lists(call), None
    if call.positions is not None:
        return _attend_over_positions(call), None
    out, _, _, *sums, _ = favor_forward(*Inputs.of(call))
    if not call.return_state:
        return out, None
    inputs = [call.key, call.value, call.form.weight, call.form.bias]
    if call.state is not None:
        inputs += [call.state.key_value, call.state.key_sum]
    if not any(tensor is not None and tensor.requires_grad for tensor in inputs):
        # All results of an operator want gradients if one does; these have none to hand on.
        sums = [tensor.detach() for tensor in sums]
    return out, FavorState(sums[0], sums[1], sums[2].detach())


def attend_part(call: AttentionCall) -> Rows:
    """Attention of which other keys have a share; see ``Backend``."""
    out, *_, log = favor_forward(*Inputs.of(call, "joined"))
    log = log.unsqueeze(-1)
    return Rows(out, (log > -math.inf).to(out.dtype), log)


class _Part(NamedTuple):
    """Some pairs of all rows.

    Attributes:
        out: Divided by its own normaliser, ``(B, Hkv, G, L, Dv)``.
        log: Natural logarithm of that, ``(B, Hkv, G, L)``, float64; minus infinity without a pair.
    """

    out: Tensor
    log: Tensor

    @classmethod
    def computed(cls, call: AttentionCall, pairs: str) -> "_Part":
        """The pairs of a call through features, "feature", or the "exact" ones."""
        out, *_, log = favor_forward(*Inputs.of(call, pairs))
        return cls(out, log)

    @classmethod
    def of(cls, rows: Rows) -> "_Part":
        """That of rows that are not yet divided."""
        there = rows.denominator != 0
        total = rows.denominator.where(there, 1.0)
        log = rows.log_scale.double() + total.double().log()
        return cls(rows.numerator / total, log.masked_fill(~there, -math.inf).squeeze(-1))


def _attend_with_lists(call: AttentionCall) -> Tensor:
    """Features, exact pairs and listed keys, each by kernels of their own, and joined.

    Pairs along the edges of a graph are gathered by torch.
    """
    squares = call.query.to(call.dtype).square()
    log_factor = math.log(call.form.normalizer) - squares.sum(-1, dtype=torch.float64) * (
        call.factor / 2
    )
    has_exact = call.window is not None or call.sink_keys is not None
    estimates, exact = [], [_Part.computed(call, "exact")] if has_exact else []
    for estimate, more in _listed_parts(call):
        estimates.append(_Part(estimate.out, estimate.log + log_factor))
        exact.append(more)
    return _join(_Part.computed(call, "feature"), estimates, exact)


def _attend_over_positions(call: AttentionCall) -> Tensor:
    """Keys on either side of the window of positions through features, and exact pairs, joined."""
    row, (coordinate, sequence) = end_to_end(call), coordinates(call)

    def placed(row: AttentionCall, pairs: str, places: Tensor) -> _Part:
        rows = (selected(x, 3, places) for x in _Part.computed(row, pairs))
        return _Part(*(in_batch(x, len(call.query)) for x in rows))

    sides = []
    for sign in (1, -1):
        numbers = None if sequence is None else sign * sequence
        side, places = keys_after_window(row, sign * coordinate, numbers)
        side = side.replaced(is_causal=True, window=0, positions=None)
        sides.append(placed(side, "feature", places))
    order = coordinate.argsort(stable=True)
    inside = row.replaced(
        query=selected(row.query, 3, order),
        key=selected(row.key, 2, order),
        value=selected(row.value, 2, order),
        key_mask=None if row.key_mask is None else row.key_mask[:, order],
        segments=sequence,
        positions=coordinate[order].unsqueeze(0),
        sink_keys=None,
    )
    exact = [placed(inside, "exact", order.argsort())]
    if call.sink_keys is not None:
        exact.append(_Part.computed(call.replaced(window=None, positions=None), "exact"))
    return _join(sides[0], [], [sides[1], *exact])


def _listed_parts(call: AttentionCall) -> Iterator[tuple[_Part, _Part]]:
    """Estimates, but for their common factor, and exact weights of pairs."""
    heads = call.query.shape[2:4]
    if isinstance(call.lists, NeighbourLists):
        with without_autocast(call.query.device):
            both = neighbour_rows(call, Features.of_call(call), call.lists)
            estimate, exact = (
                _Part.of(Rows(*(x.unflatten(2, heads) for x in rows))) for rows in both
            )
        yield estimate, exact
        return
    for pairs in listed_pairs(call):
        rows = [x.unflatten(2, heads) for x in kernel_rows(call, pairs)]
        yield _Part(*rows[:2]), _Part(*rows[2:])


def _join(feature: _Part, estimates: list[_Part], others: list[_Part]) -> Tensor:
    """``feature`` less the estimates that are in it, and other parts: rows as they come out."""
    parts = (feature, *estimates, *others)
    peak = torch.stack([part.log.detach() for part in (feature, *others)]).amax(0)
    peak = peak.where(peak > -math.inf, 0.0)
    whole, *weights = [(part.log - peak).exp() for part in parts]
    rest = [whole, *(-x for x in weights[: len(estimates)])]
    # What is left of a sum after taking away nearly all of it is rounding.
    left = torch.stack([x.detach() for x in rest]).sum(0)
    # Written so that NaN stays.
    known = ~(left <= LEAST_REST * whole.detach())
    signed = [*(x.where(known, 0.0) for x in rest), *weights[len(estimates) :]]
    total = torch.stack(signed).sum(0)
    inverse = 1 / total.where(total != 0, 1.0)
    shares = [(x * inverse).to(feature.out.dtype).unsqueeze(-1) for x in signed]
    out = feature.out * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        out = torch.addcmul(out, part.out, share)
    return out


def uncovered(call: AttentionCall) -> str | None:
    """Reason why the kernels cannot compute a call, or None.

    They take float32, bfloat16 and float16 on the CPU, with exponential or ReLU features.
    """
    form = call.form
    if call.query.device.type != "cpu":
        return f"for inputs on {call.query.device}"
    if call.dtype != torch.float32:
        return f"for {call.dtype} inputs"
    if form.kind == "trigonometric":
        return "for trigonometric features"
    if form.kind == "exponential":
        if form.weight is None or form.epsilon != 0:
            return "for exponential features with an epsilon or without a projection"
    elif kernel_kind(form) != "rectified":
        return "for elementwise features of other functions than relu"
    # Custom operators have no derivative inside vmap, grad and their like, nor forward-mode ones.
    if is_transformed():
        return "inside transforms of torch.func and forward-mode differentiation"
    return "during an ONNX export" if _exports_onnx() else None


def _exports_onnx() -> bool:
    """Return True inside ``torch.onnx.export``, for which operators have no translation."""
    # The first two are cheap; the last one imports modules when it is first called.
    return (torch.compiler.is_exporting() or is_traced()) and torch.onnx.is_in_onnx_export()


# torch.compile reads is_in_onnx_export() as False, though the exporter may call torch.compile. This
# is what torch.compiler.assume_constant_result does, which would import the compiler.
_exports_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]
