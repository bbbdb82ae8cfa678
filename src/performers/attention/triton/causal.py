"""Launches of causal passes, chunk by chunk."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from performers.attention.operators import Gradients
from performers.attention.triton.bidirectional import combine
from performers.attention.triton.kernels import chunks, mend, sums
from performers.attention.triton.kernels.parts import LOWEST
from performers.attention.triton.launcher import SUMS, Launcher, Sums
from performers.attention.triton.operators import Results, Upstream, is_swept

# Bytes of the sums before all chunks that are held at a time; calls go head by head beyond.
STATE_BYTES = 1 << 29
# A binary scale this close to an integer, relative to its size, is one: rounded by a conversion.
_INTEGRAL = 1e-5
_LOWEST = float(LOWEST.value)


class Sweep(NamedTuple):
    """A causal pass over the sequence: slots from one end, and the key that each slot brings.

    Attributes:
        norms: Of the key of each slot; see ``Launcher.key_norms``.
        delay: How far the key of a slot lies behind its query.
        strict: Whether a query does not see the key of its own slot.
        reverse: Whether slots run from the end.
    """

    norms: Tensor
    delay: int = 0
    strict: bool = False
    reverse: bool = False


class Heads(NamedTuple):
    """Key heads, of all sequences, that a pass works on at a time."""

    first: int
    size: int

    def of(self, x: Tensor) -> Tensor:
        """Their part of a tensor ``(batch, heads, ...)`` or ``(batch * heads, ...)``."""
        return x[self.first : self.first + self.size]


def sweeps(launcher: Launcher, norms: Tensor) -> list[Sweep]:
    """The causal passes of a call: none where every query sees all keys through features.

    Keys beyond the window are those of slots before a query's, delayed by the window.
    """
    inputs = launcher.inputs
    if not is_swept(inputs):
        return []
    delay = (inputs.window or 0) - inputs.offset
    found = [Sweep(norms[0], delay, strict=inputs.window is not None)]
    if not inputs.is_causal:
        found.append(Sweep(norms[1], delay, strict=True, reverse=True))
    return found


def chunk_size(launcher: Launcher) -> int:
    """Rows of a chunk of causal calls."""
    return launcher.blocks("chunk_rows").rows


def num_chunks(launcher: Launcher) -> int:
    """Chunks of the length."""
    return -(-launcher.length // chunk_size(launcher))


def parts_of_heads(launcher: Launcher) -> list[Heads]:
    """Heads in groups whose sums before all chunks are held at a time."""
    size = num_chunks(launcher) * launcher.features * (launcher.value_dim + 2) * 4
    count = max(1, STATE_BYTES // size)
    return [Heads(n, min(count, launcher.count - n)) for n in range(0, launcher.count, count)]


def _arguments(launcher: Launcher, sweep: Sweep, heads: Heads) -> dict[str, Any]:
    return {
        "NORM": sweep.norms,
        "STRICT": sweep.strict,
        "REVERSE": sweep.reverse,
        "BT": chunk_size(launcher),
        "delay": sweep.delay,
        "first": heads.first,
        "chunks": num_chunks(launcher),
    }


def _start(start: tuple[Tensor, ...] | None) -> dict[str, Any]:
    """The sums, or the gradients of sums, that a pass begins with."""
    if start is None:
        return {}
    return {"HAS_START": True, **{f"START_{x}": y for x, y in zip(SUMS, start, strict=False)}}


def states(launcher: Launcher, sweep: Sweep, heads: Heads, start: Sums | None) -> tuple[Sums, Sums]:
    """Sums before each chunk, ``(heads, chunks, ...)``, and those after the last one.

    There is one scale more than there are chunks: that of the sums after the last.
    """
    blocks = launcher.blocks("key_states")
    span, splits = launcher.spans(launcher.length, blocks, heads.size)
    arguments = {**_arguments(launcher, sweep, heads), "slots": launcher.length, "span": span}

    def run(start: Sums | None, states: dict[str, Any], ends: Sums) -> None:
        launcher.run(
            sums.key_sums, launcher.features // blocks.features * splits * heads.size, blocks,
            **arguments, **launcher.projection, **_start(start), **states, **ends.named("LAST_"),
            splits=splits,
        )  # fmt: skip

    ends = launcher.new_sums(heads.size, splits)
    if splits > 1:
        run(None, {"KV": None, "KS": None, "SCALE": None}, ends)
        parts, ends = ends, launcher.new_sums(heads.size, splits)
        total = launcher.new_sums(heads.size, 1)
        combine(launcher, parts, total, **arguments, **_start(start))
        start = parts
    shape = (heads.size, num_chunks(launcher), launcher.features)
    scale = launcher.new(heads.size, num_chunks(launcher) + 1, launcher.features)
    before = Sums(launcher.new(*shape, launcher.value_dim), launcher.new(*shape), scale)
    run(start, {**before.named(), "STATES": True}, ends)
    return before, Sums(*(x[:, -1] for x in ends))


def chunk_rows(
    launcher: Launcher,
    sweep: Sweep,
    heads: Heads,
    before: Sums,
    results: tuple[Tensor, Tensor, Tensor],
    part: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Causal output, logarithms of normalisers and lost rows, which are mended.

    ``part`` holds output and logarithms of what the rows see besides.
    """
    arguments = {
        **_arguments(launcher, sweep, heads),
        **launcher.projection,
        **before.named(),
        **dict(zip(("OUT", "LOG", "LOST"), results, strict=True)),
    }
    if part is not None:
        arguments |= {"MERGE": True, "PART_OUT": part[0], "PART_LOG": part[1]}
    programs = num_chunks(launcher) * heads.size * launcher.groups
    # The bits of float32 rows depend on their chunk.
    for again in range(2 if launcher.arguments["SPLIT"] else 1):
        blocks = launcher.blocks("chunk_rows")
        launcher.run(chunks.chunk_rows, programs, blocks, **arguments, again=again)
    _mend(launcher, mend.mend_rows, programs, arguments)


def _mend(
    launcher: Launcher,
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    table: str = "mend",
) -> None:
    """Run a kernel of ``mend.py``: on a part of each chunk, and on the real features only."""
    blocks = launcher.blocks(table)
    programs *= chunk_size(launcher) // blocks.rows
    count = launcher.inputs.weight.shape[-2]
    launcher.run(kernel, programs, blocks, **arguments, BR=blocks.rows, count=count)


def gradient_states(
    launcher: Launcher,
    sweep: Sweep,
    heads: Heads,
    row_terms: dict[str, Tensor],
    scale: Tensor,
    start: tuple[Tensor, Tensor] | None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gradients of the sums after each chunk, and of those before the first one.

    ``row_terms`` are upstream gradients, deltas and logarithms of rows; ``start`` is the upstream
    gradient of the sums after the last chunk.
    """
    blocks = launcher.blocks("query_states")
    span, splits = launcher.spans(launcher.length, blocks, heads.size)
    arguments = {**_arguments(launcher, sweep, heads), "SCALE": scale, "span": span}

    def run(start: tuple[Tensor, ...] | None, states: dict[str, Any], ends: Sums) -> None:
        launcher.run(
            sums.query_sums, launcher.features // blocks.features * splits * heads.size, blocks,
            **arguments, **row_terms, **launcher.projection, **_start(start), CAUSAL=True,
            **states, **ends.named("LAST_"), splits=splits,
        )  # fmt: skip

    ends = launcher.new_sums(heads.size, splits)
    if splits > 1:
        run(None, {"GRAD_KV": None, "GRAD_KS": None}, ends)
        parts, ends = ends, launcher.new_sums(heads.size, splits)
        combining = launcher.blocks("combine")
        launcher.run(
            sums.combine_gradients, launcher.features // combining.features * heads.size, combining,
            **arguments, **_start(start), KV=parts.key_value, KS=parts.key_sum,
            slots=launcher.length, splits=splits,
        )  # fmt: skip
        start = (parts.key_value, parts.key_sum)
    shape = (heads.size, num_chunks(launcher), launcher.features)
    after = launcher.new(*shape, launcher.value_dim), launcher.new(*shape)
    run(start, {"GRAD_KV": after[0], "GRAD_KS": after[1], "STATES": True}, ends)
    return after, (ends[0][:, 0], ends[1][:, 0])


def chunk_gradients(
    launcher: Launcher,
    sweep: Sweep,
    heads: Heads,
    row_terms: dict[str, Tensor],
    lost: Tensor,
    before: Sums,
    after: tuple[Tensor, Tensor],
    gradients: Gradients,
    add: bool,
) -> None:
    """Gradients of the queries, keys and values of a causal pass."""
    shared = {
        **_arguments(launcher, sweep, heads),
        **row_terms,
        **launcher.projection,
        "SCALE": before.scale,
        "LOST": lost,
        "ADD": add,
    }
    arguments = {**shared, **before.named(), "GRAD_Q": gradients.query, "pull": launcher.query_pull}
    programs = num_chunks(launcher) * heads.size * launcher.groups
    blocks = launcher.blocks("chunk_query_gradients")
    launcher.run(chunks.chunk_query_gradients, programs, blocks, **arguments)
    _mend(launcher, mend.mend_query_gradients, programs, arguments)
    arguments = {
        **shared,
        "GRAD_KV": after[0],
        "GRAD_KS": after[1],
        "GRAD_K": gradients.key,
        "GRAD_V": gradients.value,
        "pull": launcher.pull,
    }
    programs = num_chunks(launcher) * heads.size
    blocks = launcher.blocks("chunk_key_gradients")
    launcher.run(
        chunks.chunk_key_gradients, programs * (chunk_size(launcher) // blocks.rows), blocks,
        **arguments, BK=blocks.rows,
    )  # fmt: skip
    _mend(launcher, mend.mend_key_gradients, programs, arguments, "mend_key_gradients")


def past_sums(launcher: Launcher) -> tuple[Sums | None, Tensor | None]:
    """The sums that a call continues from at integer scales, and what they were multiplied by."""
    inputs = launcher.inputs
    if inputs.past_key_value is None:
        return None, None
    assert inputs.past_key_sum is not None
    assert inputs.past_log_scale is not None
    if launcher.scaled:
        scale = inputs.past_log_scale.flatten(0, 1) * math.log2(math.e)
        nearest = scale.round()
        snaps = (scale - nearest).abs() <= _INTEGRAL * scale.abs().clamp_min(1.0)
        whole = nearest.where(snaps, scale.ceil())
        factor = (scale - whole).exp2().masked_fill(snaps | scale.isinf(), 1.0)
    else:
        # As large as the sums are; those that are zero, or NaN, stay as they are.
        total = inputs.past_key_sum.flatten(0, 1)
        whole = total.log2().ceil().clamp_max(126.0).where(total > 0, _LOWEST)
        whole = whole.where(total == total, 0.0)
        factor = whole.neg().exp2().where(whole > _LOWEST, 1.0)
    past = launcher.new_sums(launcher.count, 1)
    for x, padding in zip(past, (0.0, 0.0, _LOWEST), strict=True):
        x.fill_(padding)
    count = whole.shape[-1]
    past.key_value[:, 0, :count] = inputs.past_key_value.flatten(0, 1) * factor.unsqueeze(-1)
    past.key_sum[:, 0, :count] = inputs.past_key_sum.flatten(0, 1) * factor
    past.scale[:, 0, :count] = whole.clamp_min(_LOWEST)
    return past, factor


def copy_state(launcher: Launcher, heads: Heads, last: Sums, results: Results) -> None:
    """Set the state after the last key: real features, natural logarithms of scales.

    Sums of features that are no exponentials have none.
    """
    count = launcher.inputs.weight.shape[-2]
    key_value, key_sum, scale = (x[:, :count] for x in last)
    if launcher.scaled:
        log_scale = (scale * math.log(2)).masked_fill(scale == _LOWEST, -math.inf)
    else:
        size, log_scale = scale.exp2(), torch.zeros_like(scale)
        key_value, key_sum = key_value * size.unsqueeze(-1), key_sum * size
    for to, x in zip(results[-3:], (key_value, key_sum, log_scale), strict=True):
        heads.of(to.flatten(0, 1)).copy_(x)


def final_gradients(launcher: Launcher, upstream: Upstream) -> tuple[Tensor, Tensor] | None:
    """Upstream gradients of the state, padded: ``(batch * heads, 1, features, ...)``.

    Of the sums as the state holds them: ``at_scale`` makes them gradients of those at a scale.
    """
    if upstream.grad_key_value is None and upstream.grad_key_sum is None:
        return None
    padded_sums = launcher.new_sums(launcher.count, 1)[:2]
    count = launcher.inputs.weight.shape[-2]
    for x, grad in zip(padded_sums, (upstream.grad_key_value, upstream.grad_key_sum), strict=True):
        x.zero_()
        if grad is not None:
            x[:, 0, :count] = grad.flatten(0, 1)
    return padded_sums


def at_scale(
    launcher: Launcher, final: tuple[Tensor, Tensor], scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Upstream gradients of the sums after the last chunk, from those of the state."""
    if launcher.scaled:
        return final
    size = scale[:, -1:].exp2()
    return final[0] * size.unsqueeze(-1), final[1] * size


def copy_past_gradients(
    heads: Heads, first: tuple[Tensor, Tensor], factor: Tensor, gradients: Gradients
) -> None:
    """Set the gradients of the sums that a call continues from."""
    count, factor = factor.shape[-1], heads.of(factor)
    of_value, of_sum = (x[:, :count] for x in first)
    heads.of(gradients.past_key_value.flatten(0, 1)).copy_(of_value * factor.unsqueeze(-1))
    heads.of(gradients.past_key_sum.flatten(0, 1)).copy_(of_sum * factor)
