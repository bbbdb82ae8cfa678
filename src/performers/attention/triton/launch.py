"""From the arguments of an operator to launches of kernels.

Nothing is read back from the device, so calls can be captured in a CUDA graph.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from performers.attention.operators import Gradients, Inputs
from performers.attention.triton import chunks, mend, near, rows, sums
from performers.attention.triton import step as steps
from performers.attention.triton.blocks import LOWEST
from performers.attention.triton.operators import (
    Results,
    StepResults,
    Upstream,
    has_exact_pairs,
    is_swept,
    new_gradients,
    new_results,
    new_step,
    padded_features,
)

# The least positions of a split, below which combining sums costs more than it gains.
LEAST_SPAN = 512
# Bytes of the sums before all chunks that are held at a time; calls go head by head beyond.
STATE_BYTES = 1 << 29
# A binary scale this close to an integer, relative to its size, is one: rounded by a conversion.
_INTEGRAL = 1e-5
_LOWEST = float(LOWEST.value)


class Blocks(NamedTuple):
    """The shape of a kernel's blocks: features and rows at a time, warps, stages of loads."""

    features: int
    rows: int
    warps: int
    stages: int


# By kernel: blocks for a head_dim up to 64 and 128, on sm_80 and on sm_90 and later. They are about
# the largest that compile without spills; tests/attention/triton/test_compiles.py keeps them so.
_TABLE: dict[str, dict[int, tuple[Blocks, Blocks]]] = {
    "key_norms": {
        64: (Blocks(0, 64, 4, 1), Blocks(0, 64, 4, 1)),
        128: (Blocks(0, 32, 4, 1), Blocks(0, 32, 4, 1)),
    },
    "key_sums": {
        64: (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
        128: (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    },
    "key_states": {
        64: (Blocks(32, 64, 4, 2), Blocks(64, 64, 4, 2)),
        128: (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    },
    "combine": {
        64: (Blocks(16, 0, 4, 1), Blocks(16, 0, 4, 1)),
        128: (Blocks(16, 0, 4, 1), Blocks(16, 0, 4, 1)),
    },
    "read_rows": {
        64: (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2)),
        128: (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    },
    "row_terms": {
        64: (Blocks(0, 64, 4, 1), Blocks(0, 64, 4, 1)),
        128: (Blocks(0, 32, 4, 1), Blocks(0, 32, 4, 1)),
    },
    "query_sums": {
        64: (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
        128: (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    },
    "query_states": {
        64: (Blocks(32, 64, 4, 2), Blocks(64, 64, 8, 2)),
        128: (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
    },
    "query_gradients": {
        64: (Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 2)),
        128: (Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)),
    },
    "key_gradients": {
        64: (Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 2)),
        128: (Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)),
    },
    "chunk_rows": {
        64: (Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 2)),
        128: (Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)),
    },
    "chunk_query_gradients": {
        64: (Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 2)),
        128: (Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)),
    },
    # Rows are keys, of a chunk.
    "chunk_key_gradients": {
        64: (Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
        128: (Blocks(16, 32, 8, 1), Blocks(16, 64, 8, 1)),
    },
    # Rows at a time, of a chunk.
    "mend": {
        64: (Blocks(0, 16, 4, 1), Blocks(0, 16, 4, 1)),
        128: (Blocks(0, 16, 4, 1), Blocks(0, 16, 4, 1)),
    },
    "mend_key_gradients": {
        64: (Blocks(0, 16, 8, 1), Blocks(0, 16, 8, 1)),
        128: (Blocks(0, 16, 8, 1), Blocks(0, 16, 8, 1)),
    },
    # Features are keys.
    "near": {
        64: (Blocks(32, 64, 4, 3), Blocks(64, 64, 4, 2)),
        128: (Blocks(32, 64, 8, 2), Blocks(64, 64, 8, 2)),
    },
    # Rows are columns of values.
    "decode_step": {
        64: (Blocks(32, 64, 4, 1), Blocks(32, 64, 4, 1)),
        128: (Blocks(32, 64, 4, 1), Blocks(32, 64, 4, 1)),
    },
}


def blocks_of(kernel: str, width: int, capability: int) -> Blocks:
    """The blocks of a kernel for a padded head_dim, the larger of those of keys and values."""
    return _TABLE[kernel][64 if width <= 64 else 128][capability >= 90]


def padded(size: int) -> int:
    """The power of two, 16 at least, that holds a head_dim."""
    return max(16, triton.next_power_of_2(size))


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Compute capability, as 80 for 8.0, and processors; of the CPU for the interpreter."""
    if device.type != "cuda":
        return 90, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rowwise(x: Tensor) -> Tensor:
    """The tensor with the elements of a row in one piece, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Projection(NamedTuple):
    """``W sqrt(scale) log2(e)`` in two parts, and ``b log2(e)``, padded; see ``blocks.py``.

    Attributes:
        hi: Shape ``(1 or heads, features, BD)``, in the dtype of the inputs.
        lo: What ``hi`` lacks; ``hi`` itself where that is float32.
        bias: Shape ``(1 or heads, features)``, float32.
    """

    hi: Tensor
    lo: Tensor
    bias: Tensor

    @classmethod
    def of(cls, inputs: Inputs, dtype: torch.dtype) -> "Projection":
        """The projection of a call, in the dtype of its queries."""
        heads, count, width = inputs.weight.shape
        features = padded_features(inputs)
        exact = inputs.weight.new_zeros((heads, features, padded(width)), dtype=torch.float64)
        exact[:, :count, :width] = inputs.weight
        exact *= math.sqrt(inputs.scale) * math.log2(math.e)
        bias = inputs.weight.new_full((heads, features), -math.inf, dtype=torch.float32)
        bias[:, :count] = 0.0 if inputs.bias is None else inputs.bias * math.log2(math.e)
        hi = exact.to(dtype)
        return cls(hi, hi if dtype == torch.float32 else (exact - hi).to(dtype), bias)


class Sums(NamedTuple):
    """Sums over keys of some heads, as kernels read them: scales are binary logarithms."""

    key_value: Tensor
    key_sum: Tensor
    scale: Tensor


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


class Launcher:
    """The kernels of one call: its sizes, its packed projection, and what every launch passes."""

    def __init__(self, inputs: Inputs) -> None:
        """Take the sizes of a call."""
        query, key, value = (rowwise(x) for x in (inputs.query, inputs.key, inputs.value))
        self.inputs = inputs
        self.query, self.key, self.value = query, key, value
        self.batch, self.heads, self.groups, self.length, self.head_dim = query.shape
        self.size, self.value_dim = value.shape[2:]
        self.capability, self.processors = _device(query.device)
        self.features = padded_features(inputs)
        self.sinks = 0 if inputs.sink_key is None else inputs.sink_key.shape[2]
        self.norm = inputs.scale * math.log2(math.e) / 2 if inputs.quadratic else 0.0
        self.pull = inputs.scale if inputs.quadratic else 0.0
        # Beside exact pairs a query's own factor matters, and the mean over draws.
        self.query_pull = self.pull if has_exact_pairs(inputs) else 0.0
        self.log_normalizer = math.log2(inputs.normalizer) if has_exact_pairs(inputs) else 0.0
        self.widths = {
            "D": self.head_dim,
            "DV": self.value_dim,
            "BD": padded(self.head_dim),
            "BV": padded(self.value_dim),
        }
        self.products = {
            "PER_HEAD": inputs.weight.shape[0] > 1,
            "SPLIT": query.dtype != torch.float32,
            "OPERAND": tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float32,
            # Of float32 operands; three products keep all digits of float32 inputs.
            "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        }

    @cached_property
    def projection(self) -> Projection:
        """The packed projection."""
        return Projection.of(self.inputs, self.query.dtype)

    @property
    def count(self) -> int:
        """Key heads of all sequences."""
        return self.batch * self.heads

    def blocks(self, kernel: str) -> Blocks:
        """The blocks of a kernel in this call."""
        width = max(self.widths["BD"], self.widths["BV"])
        return blocks_of(kernel, width, self.capability)

    def new(self, *shape: int) -> Tensor:
        """A float32 tensor."""
        return self.query.new_empty(shape, dtype=torch.float32)

    def launch(
        self, kernel: Any, programs: int, *args: Any, blocks: Blocks, **constants: Any
    ) -> None:
        """Launch as many programs of a kernel, unless there are none."""
        if programs:
            kernel[(programs,)](
                *args, num_warps=blocks.warps, num_stages=blocks.stages, **constants
            )

    def spans(self, length: int, blocks: Blocks, heads: int) -> tuple[int, int]:
        """Positions of a split, and how many splits a length has."""
        programs = heads * (self.features // blocks.features)
        splits = min(-(-4 * self.processors // programs), length // LEAST_SPAN)
        span = -(-length // (max(1, splits) * blocks.rows)) * blocks.rows
        return span, -(-length // span)

    def key_norms(self, norms: Tensor, delay: int = 0, reverse: bool = False) -> None:
        """Set norms of the keys of all slots, ``(batch * heads, slots)``."""
        inputs, blocks = self.inputs, self.blocks("key_norms")
        slots = norms.shape[1]
        self.launch(
            sums.key_norms,
            -(-slots // blocks.rows) * self.count,
            self.key, self.value, _bytes(inputs.key_mask), inputs.segments, norms,
            *self.key.stride()[:3], *self.value.stride()[:3],
            self.heads, slots, self.size, delay, self.norm,
            **self.widths,
            BT=blocks.rows,
            HAS_MASK=inputs.key_mask is not None,
            HAS_SEG=inputs.segments is not None,
            REVERSE=reverse,
            blocks=blocks,
        )  # fmt: skip

    def total_sums(self, norms: Tensor) -> Sums:
        """Sums over all keys, ``(batch * heads, features, value_dim)``, key sums, scales."""
        blocks = self.blocks("key_sums")
        span, splits = self.spans(self.size, blocks, self.count)
        parts = self.new_sums(self.count, splits)
        self.launch(
            sums.key_sums,
            self.features // blocks.features * splits * self.count,
            self.key, self.value, norms, None, *self.projection, None, None, None,
            None, None, None, *parts,
            *self.key.stride()[:3], *self.value.stride()[:3],
            self.heads, 0, self.size, 0, span, splits, 0, self.features,
            **self.widths, **self.products,
            BM=blocks.features, BT=blocks.rows,
            HAS_START=False, STATES=False, HAS_SEG=False, REVERSE=False,
            blocks=blocks,
        )  # fmt: skip
        if splits == 1:
            return Sums(*(x.squeeze(1) for x in parts))
        total = Sums(*(x.squeeze(1) for x in self.new_sums(self.count, 1)))
        self.combine(parts, None, total, self.size, span)
        return total

    def combine(
        self, parts: Sums, start: Sums | None, total: Sums, length: int, span: int, **options: bool
    ) -> None:
        """Turn sums of splits into those before them, from ``start`` on, and set the total."""
        blocks = self.blocks("combine")
        heads, splits = parts.key_sum.shape[:2]
        self.launch(
            sums.combine,
            self.features // blocks.features * heads,
            *parts, *(start or (None, None, None)), *total, self.inputs.segments,
            length, span, splits, self.features,
            DV=self.value_dim, BV=self.widths["BV"], BM=blocks.features,
            HAS_START=start is not None,
            **{"HAS_SEG": False, "REVERSE": False, **options},
            blocks=blocks,
        )  # fmt: skip

    def new_sums(self, heads: int, parts: int) -> Sums:
        """Empty sums of some parts of the keys."""
        shape = (heads, parts, self.features)
        return Sums(self.new(*shape, self.value_dim), self.new(*shape), self.new(*shape))

    def read_rows(self, total: Sums, out: Tensor, log: Tensor) -> None:
        """Bidirectional output and logarithms of normalisers."""
        blocks = self.blocks("read_rows")
        self.launch(
            rows.read_rows,
            -(-self.length // blocks.rows) * self.count * self.groups,
            self.query, *self.projection, *total, out, log,
            *self.query.stride()[:4], *out.stride()[:4],
            self.heads, self.groups, self.length, self.features,
            **self.widths, **self.products,
            BM=blocks.features, BT=blocks.rows,
            blocks=blocks,
        )  # fmt: skip

    def row_terms(self, results: Results, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``grad_out . out`` of each row, and its logarithm for exact pairs and for features."""
        blocks = self.blocks("row_terms")
        out, log = results.out, results.log_normaliser
        delta, ready = torch.empty_like(log), torch.empty_like(log)
        exact = has_exact_pairs(self.inputs)
        feature_ready = torch.empty_like(log) if exact else ready
        self.launch(
            sums.row_terms,
            -(-self.length // blocks.rows) * self.count * self.groups,
            self.query, out, grad_out, log, delta, ready, feature_ready,
            *self.query.stride()[:4], *out.stride()[:4], *grad_out.stride()[:4],
            self.heads, self.groups, self.length, self.norm, self.log_normalizer,
            **self.widths, BT=blocks.rows, EXACT=exact,
            blocks=blocks,
        )  # fmt: skip
        return delta, ready, feature_ready

    def total_gradients(
        self, grad_out: Tensor, delta: Tensor, log: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the sums over all keys."""
        blocks = self.blocks("query_sums")
        span, splits = self.spans(self.length, blocks, self.count)
        grad_kv, grad_ks, _ = self.new_sums(self.count, splits)
        self.launch(
            sums.query_sums,
            self.features // blocks.features * splits * self.count,
            self.query, grad_out, delta, log, None, *self.projection, scale, None, None,
            None, None, grad_kv, grad_ks,
            *self.query.stride()[:4], *grad_out.stride()[:4],
            self.heads, self.groups, 0, self.length, span, splits, 0, self.features,
            **self.widths, **self.products,
            BM=blocks.features, BT=blocks.rows,
            HAS_START=False, CAUSAL=False, STATES=False, HAS_SEG=False, REVERSE=False,
            blocks=blocks,
        )  # fmt: skip
        # Split after split, the same in every run.
        return grad_kv.sum(1), grad_ks.sum(1)

    def query_gradients(
        self,
        grad_out: Tensor,
        delta: Tensor,
        log: Tensor,
        total: Sums,
        grad_query: Tensor,
        *,
        add: bool = False,
    ) -> None:
        """Gradients of bidirectional queries."""
        blocks = self.blocks("query_gradients")
        self.launch(
            rows.query_gradients,
            -(-self.length // blocks.rows) * self.count * self.groups,
            self.query, grad_out, delta, log, *self.projection, *total, grad_query,
            *self.query.stride()[:4], *grad_out.stride()[:4], *grad_query.stride()[:4],
            self.heads, self.groups, self.length, self.features, self.query_pull,
            **self.widths, **self.products,
            BM=blocks.features, BT=blocks.rows, ADD=add,
            blocks=blocks,
        )  # fmt: skip

    def key_gradients(
        self,
        norms: Tensor,
        scale: Tensor,
        gradients: tuple[Tensor, Tensor],
        grad_key: Tensor,
        grad_value: Tensor,
        *,
        add: bool = False,
    ) -> None:
        """Gradients of keys and values that were summed once and for all."""
        blocks = self.blocks("key_gradients")
        self.launch(
            rows.key_gradients,
            -(-self.size // blocks.rows) * self.count,
            self.key, self.value, norms, *self.projection, scale, *gradients,
            grad_key, grad_value,
            *self.key.stride()[:3], *self.value.stride()[:3],
            *grad_key.stride()[:3], *grad_value.stride()[:3],
            self.heads, self.size, self.features, self.pull,
            **self.widths, **self.products,
            BM=blocks.features, BT=blocks.rows, ADD=add,
            blocks=blocks,
        )  # fmt: skip

    @property
    def chunk(self) -> int:
        """Rows of a chunk of causal calls."""
        return self.blocks("chunk_rows").rows

    @property
    def chunks(self) -> int:
        """Chunks of the length."""
        return -(-self.length // self.chunk)

    def parts_of_heads(self) -> list[Heads]:
        """Heads in groups whose sums before all chunks are held at a time."""
        size = self.chunks * self.features * (self.value_dim + 2) * 4
        count = max(1, STATE_BYTES // size)
        return [Heads(n, min(count, self.count - n)) for n in range(0, self.count, count)]

    def _sweep(self, sweep: Sweep) -> dict[str, Any]:
        return {
            "BT": self.chunk,
            "HAS_SEG": self.inputs.segments is not None,
            "REVERSE": sweep.reverse,
        }

    def states(self, sweep: Sweep, heads: Heads, start: Sums | None) -> tuple[Sums, Sums]:
        """Sums before each chunk, ``(heads, chunks, ...)``, and those after the last one.

        There is one scale more than there are chunks: that of the sums after the last.
        """
        blocks = self.blocks("key_states")
        span, splits = self.spans(self.length, blocks, heads.size)
        options = self._sweep(sweep)

        def run(start: Sums | None, states: tuple[Tensor | None, ...], ends: Sums) -> None:
            self.launch(
                sums.key_sums,
                self.features // blocks.features * splits * heads.size,
                self.key, self.value, sweep.norms, self.inputs.segments, *self.projection,
                *(start or (None, None, None)), *states, *ends,
                *self.key.stride()[:3], *self.value.stride()[:3],
                self.heads, heads.first, self.length, sweep.delay, span, splits, self.chunks,
                self.features,
                **self.widths, **self.products, **options, BM=blocks.features,
                HAS_START=start is not None, STATES=states[0] is not None,
                blocks=blocks,
            )  # fmt: skip

        ends = self.new_sums(heads.size, splits)
        if splits > 1:
            run(None, (None, None, None), ends)
            parts, ends = ends, self.new_sums(heads.size, splits)
            total = self.new_sums(heads.size, 1)
            flags = {name: options[name] for name in ("HAS_SEG", "REVERSE")}
            self.combine(parts, start, total, self.length, span, **flags)
            start = parts
        shape = (heads.size, self.chunks, self.features)
        scale = self.new(heads.size, self.chunks + 1, self.features)
        before = Sums(self.new(*shape, self.value_dim), self.new(*shape), scale)
        run(start, before, ends)
        return before, Sums(*(x[:, -1] for x in ends))

    def _chunk_inputs(self, sweep: Sweep) -> tuple[Any, ...]:
        return self.query, self.key, self.value, sweep.norms, self.inputs.segments

    def _chunk_strides(self) -> tuple[int, ...]:
        return (*self.query.stride()[:4], *self.key.stride()[:3], *self.value.stride()[:3])

    def _chunk_sizes(self, sweep: Sweep, heads: Heads) -> tuple[int, ...]:
        sizes = (self.length, sweep.delay, self.chunks, self.features)
        return self.heads, self.groups, heads.first, *sizes

    def chunk_rows(
        self,
        sweep: Sweep,
        heads: Heads,
        before: Sums,
        results: tuple[Tensor, Tensor, Tensor],
        part: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Causal output, logarithms of normalisers and lost rows, which are mended.

        ``part`` holds output and logarithms of what the rows see besides.
        """
        out = results[0]
        strides = (*self._chunk_strides(), *(part or results)[0].stride()[:4], *out.stride()[:4])
        arguments = (
            *self._chunk_inputs(sweep), *self.projection, *before, *(part or (None, None)),
            *results, *strides, *self._chunk_sizes(sweep, heads),
        )  # fmt: skip
        options = {**self._sweep(sweep), "STRICT": sweep.strict, "MERGE": part is not None}
        programs = self.chunks * heads.size * self.groups
        blocks = self.blocks("chunk_rows")
        self.launch(
            chunks.chunk_rows, programs, *arguments,
            **self.widths, **self.products, **options, BM=blocks.features,
            blocks=blocks,
        )  # fmt: skip
        self._mend(mend.mend_rows, programs, arguments, options)

    def _mend(
        self,
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        table: str = "mend",
    ) -> None:
        """Run a kernel of ``mend.py``: on a part of each chunk, and on the real features only."""
        blocks = self.blocks(table)
        self.launch(
            kernel, programs * (self.chunk // blocks.rows),
            *arguments, self.inputs.weight.shape[-2],
            **self.widths, **options, BR=blocks.rows,
            PER_HEAD=self.products["PER_HEAD"], SPLIT=self.products["SPLIT"],
            PRECISION=self.products["PRECISION"],
            blocks=blocks,
        )  # fmt: skip

    def gradient_states(
        self,
        sweep: Sweep,
        heads: Heads,
        rows: tuple[Tensor, Tensor, Tensor],
        scale: Tensor,
        start: tuple[Tensor, Tensor] | None,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Gradients of the sums after each chunk, and of those before the first one.

        ``rows`` are upstream gradients, deltas and logarithms; ``start`` is the upstream gradient
        of the sums after the last chunk.
        """
        blocks = self.blocks("query_states")
        span, splits = self.spans(self.length, blocks, heads.size)
        options = self._sweep(sweep)
        grad_out = rows[0]

        def run(
            start: tuple[Tensor, ...] | None,
            states: tuple[Tensor | None, ...],
            ends: tuple[Tensor, ...],
        ) -> None:
            self.launch(
                sums.query_sums,
                self.features // blocks.features * splits * heads.size,
                self.query, *rows, self.inputs.segments, *self.projection, scale,
                *(start or (None, None)), *states, *ends,
                *self.query.stride()[:4], *grad_out.stride()[:4],
                self.heads, self.groups, heads.first, self.length, span, splits, self.chunks,
                self.features,
                **self.widths, **self.products, **options, BM=blocks.features,
                HAS_START=start is not None, CAUSAL=True, STATES=states[0] is not None,
                blocks=blocks,
            )  # fmt: skip

        ends = self.new_sums(heads.size, splits)[:2]
        if splits > 1:
            run(None, (None, None), ends)
            parts, ends = ends, self.new_sums(heads.size, splits)[:2]
            combining = self.blocks("combine")
            self.launch(
                sums.combine_gradients,
                self.features // combining.features * heads.size,
                *parts, scale, *(start or (None, None)), self.inputs.segments,
                self.length, span, splits, self.chunks, self.features,
                DV=self.value_dim, BV=self.widths["BV"], BM=combining.features, **options,
                HAS_START=start is not None,
                blocks=combining,
            )  # fmt: skip
            start = parts
        shape = (heads.size, self.chunks, self.features)
        after = self.new(*shape, self.value_dim), self.new(*shape)
        run(start, after, ends)
        return after, (ends[0][:, 0], ends[1][:, 0])

    def chunk_gradients(
        self,
        sweep: Sweep,
        heads: Heads,
        rows: tuple[Tensor, Tensor, Tensor],
        lost: Tensor,
        before: Sums,
        after: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor, Tensor],
        *,
        add: bool = False,
    ) -> None:
        """Gradients of the queries, keys and values of a causal pass."""
        inputs = (*self._chunk_inputs(sweep), *rows, lost, *self.projection)
        strides = (*self._chunk_strides(), *rows[0].stride()[:4])
        sizes = self._chunk_sizes(sweep, heads)
        options = {**self._sweep(sweep), "STRICT": sweep.strict}
        query, key, value = gradients
        arguments = (
            *inputs, *before, query, *strides, *query.stride()[:4], *sizes, self.query_pull,
        )  # fmt: skip
        programs = self.chunks * heads.size * self.groups
        blocks = self.blocks("chunk_query_gradients")
        self.launch(
            chunks.chunk_query_gradients, programs, *arguments,
            **self.widths, **self.products, **options, ADD=add, BM=blocks.features,
            blocks=blocks,
        )  # fmt: skip
        self._mend(mend.mend_query_gradients, programs, arguments, options)
        ends = (key, value, *strides, *key.stride()[:3], *value.stride()[:3], *sizes, self.pull)
        programs = self.chunks * heads.size
        blocks = self.blocks("chunk_key_gradients")
        self.launch(
            chunks.chunk_key_gradients, programs * (self.chunk // blocks.rows),
            *inputs, *after, before.scale, *ends,
            **self.widths, **self.products, **options, ADD=add, BM=blocks.features, BK=blocks.rows,
            blocks=blocks,
        )  # fmt: skip
        self._mend(
            mend.mend_key_gradients, programs, (*inputs, *ends), options, "mend_key_gradients"
        )

    def _near(self) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any], Blocks]:
        """Sinks and their strides, sizes, and constants of the kernels of exact pairs."""
        inputs, blocks = self.inputs, self.blocks("near")
        sinks = inputs.sink_keys
        options = {
            **self.widths,
            "BT": blocks.rows,
            "HAS_SEG": inputs.segments is not None,
            "OPERAND": self.products["OPERAND"],
            "PRECISION": self.products["PRECISION"],
        }
        if sinks is None:
            return (None, None, None), (0,) * 6, options, blocks
        key, value = rowwise(sinks.key), rowwise(sinks.value)
        strides = (*key.stride()[:3], *value.stride()[:3])
        return (key, value, sinks.first.contiguous()), strides, options, blocks

    def _near_sizes(self) -> tuple[int, ...]:
        inputs = self.inputs
        return (self.length, self.size, inputs.offset, inputs.window or 0)

    def every_norm(self) -> Tensor | None:
        """Norms of the keys as they stand, for the window."""
        if self.inputs.window is None:
            return None
        norms = self.new(self.count, self.size)
        self.key_norms(norms)
        return norms

    def near_rows(
        self, norms: Tensor | None, part: tuple[Tensor, Tensor], results: Results
    ) -> None:
        """Output and logarithms of features and exact pairs together."""
        sinks, strides, options, blocks = self._near()
        inputs, out = self.inputs, results.out
        self.launch(
            near.near_rows,
            -(-self.length // blocks.rows) * self.count * self.groups,
            self.query, self.key, self.value, norms, inputs.segments, *sinks, *part, out,
            results.log_normaliser,
            *self._chunk_strides(), *part[0].stride()[:4], *out.stride()[:4], *strides,
            self.heads, self.groups, *self._near_sizes(), self.sinks,
            inputs.scale * math.log2(math.e), self.norm, self.log_normalizer,
            **options, BS=blocks.features, CAUSAL=inputs.is_causal,
            HAS_WINDOW=inputs.window is not None, HAS_SINKS=self.sinks > 0,
            blocks=blocks,
        )  # fmt: skip

    def near_gradients(
        self, norms: Tensor | None, rows: tuple[Tensor, Tensor, Tensor], gradients: Gradients
    ) -> None:
        """Add the gradients by exact pairs, and set those of sinks."""
        sinks, strides, options, blocks = self._near()
        inputs, grad_out = self.inputs, rows[0]
        scale = inputs.scale * math.log2(math.e)
        query, key, value = gradients[:3]
        self.launch(
            near.near_query_gradients,
            -(-self.length // blocks.rows) * self.count * self.groups,
            self.query, self.key, self.value, norms, inputs.segments, *sinks, *rows, query,
            *self._chunk_strides(), *grad_out.stride()[:4], *query.stride()[:4], *strides,
            self.heads, self.groups, *self._near_sizes(), self.sinks, scale, inputs.scale,
            **options, BS=blocks.features, CAUSAL=inputs.is_causal,
            HAS_WINDOW=inputs.window is not None, HAS_SINKS=self.sinks > 0,
            blocks=blocks,
        )  # fmt: skip
        if inputs.window is not None:
            self.launch(
                near.near_key_gradients,
                -(-self.size // blocks.features) * self.count,
                self.query, self.key, self.value, norms, inputs.segments, *rows, key, value,
                *self._chunk_strides(), *grad_out.stride()[:4],
                *key.stride()[:3], *value.stride()[:3],
                self.heads, self.groups, *self._near_sizes(), scale, inputs.scale,
                **options, BS=blocks.features, CAUSAL=inputs.is_causal,
                blocks=blocks,
            )  # fmt: skip
        if self.sinks:
            self._sink_gradients(rows, gradients)

    def _sink_gradients(self, rows: tuple[Tensor, Tensor, Tensor], gradients: Gradients) -> None:
        sinks, strides, options, blocks = self._near()
        inputs = self.inputs
        sequences = sinks[0].shape[0]
        bounds = torch.zeros(sequences, 2, dtype=torch.int64, device=self.query.device)
        if inputs.segments is None:
            bounds[:, 1] = self.length
        else:
            each = torch.arange(sequences, device=self.query.device)
            bounds[:, 0] = torch.searchsorted(inputs.segments, each)
            bounds[:, 1] = torch.searchsorted(inputs.segments, each, right=True)
        programs = -(-self.sinks // 16) * self.heads * sequences
        splits = max(
            1, min(-(-2 * self.processors // programs), self.length // sequences // LEAST_SPAN)
        )
        shape = (splits, sequences, self.heads, self.sinks)
        grad_key, grad_value = self.new(*shape, self.head_dim), self.new(*shape, self.value_dim)
        self.launch(
            near.sink_gradients,
            programs * splits,
            self.query, inputs.segments, *sinks, bounds, *rows, grad_key, grad_value,
            *self.query.stride()[:4], *rows[0].stride()[:4], *strides,
            self.heads, self.groups, self.length, sequences, self.sinks, splits,
            inputs.scale * math.log2(math.e), inputs.scale,
            **options,
            blocks=blocks,
        )  # fmt: skip
        # Split after split, the same in every run.
        gradients.sink_key.copy_(grad_key.sum(0))
        gradients.sink_value.copy_(grad_value.sum(0))

    def new_rows(self) -> tuple[Tensor, Tensor]:
        """Float32 output rows and their logarithms."""
        shape = (self.batch, self.heads, self.groups, self.length)
        return self.new(*shape, self.value_dim), self.new(*shape)

    def sweeps(self, norms: Tensor) -> list[Sweep]:
        """The causal passes of a call: none where every query sees all keys through features.

        Keys beyond the window are those of slots before a query's, delayed by the window.
        """
        inputs = self.inputs
        if not is_swept(inputs):
            return []
        delay = (inputs.window or 0) - inputs.offset
        found = [Sweep(norms[0], delay, strict=inputs.window is not None)]
        if not inputs.is_causal:
            found.append(Sweep(norms[1], delay, strict=True, reverse=True))
        return found


def forward(inputs: Inputs) -> Results:
    """The results of a call."""
    with _current(inputs.query.device):
        return _forward(Launcher(inputs))


def _forward(launcher: Launcher) -> Results:
    inputs, results = launcher.inputs, new_results(launcher.inputs)
    rows = (results.out, results.log_normaliser)
    exact = has_exact_pairs(inputs)
    if exact:
        rows = launcher.new_rows()
    sweeps = launcher.sweeps(results.key_norm)
    if sweeps:
        for sweep in sweeps:
            launcher.key_norms(sweep.norms, sweep.delay, sweep.reverse)
        _sweep_rows(launcher, sweeps, rows, results)
    else:
        launcher.key_norms(results.key_norm[0])
        total = launcher.total_sums(results.key_norm[0])
        launcher.read_rows(total, *rows)
        results = results._replace(
            key_value=total.key_value, key_sum=total.key_sum, log_scale=total.scale
        )
    if exact:
        launcher.near_rows(launcher.every_norm(), rows, results)
    return results


def _sweep_rows(
    launcher: Launcher, sweeps: list[Sweep], rows: tuple[Tensor, Tensor], results: Results
) -> None:
    """Rows through features, by one or two causal passes, and the state after the first."""
    past, _ = _past(launcher)
    # What the first pass hands on to the second.
    part = launcher.new_rows() if len(sweeps) > 1 else None
    for heads in launcher.parts_of_heads():
        start = None if past is None else Sums(*(heads.of(x) for x in past))
        before, last = launcher.states(sweeps[0], heads, start)
        launcher.chunk_rows(sweeps[0], heads, before, (*(part or rows), results.lost[0]))
        if launcher.inputs.return_state:
            _copy_state(launcher, heads, last, results)
        if part is not None:
            before, _ = launcher.states(sweeps[1], heads, None)
            launcher.chunk_rows(sweeps[1], heads, before, (*rows, results.lost[1]), part)


def backward(upstream: Upstream, inputs: Inputs, results: Results) -> Gradients:
    """The gradients of a call."""
    with _current(inputs.query.device):
        return _backward(Launcher(inputs), upstream, results)


def _backward(launcher: Launcher, upstream: Upstream, results: Results) -> Gradients:
    gradients = new_gradients(launcher.inputs)
    grad_out = rowwise(upstream.grad_out)
    delta, log, feature_log = launcher.row_terms(results, grad_out)
    sweeps = launcher.sweeps(results.key_norm)
    exact = has_exact_pairs(launcher.inputs)
    rows = (grad_out, delta, feature_log)
    added = gradients
    if exact or len(sweeps) > 1:
        # Several passes add to these.
        added = gradients._replace(
            **{
                name: torch.zeros_like(getattr(gradients, name), dtype=torch.float32)
                for name in ("query", "key", "value")
            }
        )
    if sweeps:
        _sweep_gradients(launcher, sweeps, upstream, rows, results, added)
    else:
        total = Sums(results.key_value, results.key_sum, results.log_scale)
        launcher.query_gradients(*rows, total, added.query)
        of_sums = launcher.total_gradients(*rows, results.log_scale)
        launcher.key_gradients(
            results.key_norm[0], results.log_scale, of_sums, added.key, added.value
        )
    if exact:
        launcher.near_gradients(launcher.every_norm(), (grad_out, delta, log), added)
    for to, x in zip(gradients[:3], added[:3], strict=True):
        if to is not x:
            to.copy_(x)
    return gradients


def _sweep_gradients(
    launcher: Launcher,
    sweeps: list[Sweep],
    upstream: Upstream,
    rows: tuple[Tensor, Tensor, Tensor],
    results: Results,
    gradients: Gradients,
) -> None:
    """Gradients through features by one or two causal passes."""
    past, factor = _past(launcher)
    final = _final_gradients(launcher, upstream)
    add = has_exact_pairs(launcher.inputs) or len(sweeps) > 1
    for heads in launcher.parts_of_heads():
        start = None if past is None else Sums(*(heads.of(x) for x in past))
        last = None if final is None else (heads.of(final[0]), heads.of(final[1]))
        for sweep, lost in zip(sweeps, results.lost, strict=True):
            before, _ = launcher.states(sweep, heads, start)
            after, first = launcher.gradient_states(sweep, heads, rows, before.scale, last)
            launcher.chunk_gradients(
                sweep, heads, rows, lost, before, after, gradients[:3], add=add
            )
            start = last = None
            if factor is not None:
                _copy_past_gradients(heads, first, factor, gradients)


def _copy_past_gradients(
    heads: Heads, first: tuple[Tensor, Tensor], factor: Tensor, gradients: Gradients
) -> None:
    count, factor = factor.shape[-1], heads.of(factor)
    of_value, of_sum = (x[:, :count] for x in first)
    heads.of(gradients.past_key_value.flatten(0, 1)).copy_(of_value * factor.unsqueeze(-1))
    heads.of(gradients.past_key_sum.flatten(0, 1)).copy_(of_sum * factor)


def _past(launcher: Launcher) -> tuple[Sums | None, Tensor | None]:
    """The sums that a call continues from at integer scales, and what they were multiplied by."""
    inputs = launcher.inputs
    if inputs.past_key_value is None:
        return None, None
    assert inputs.past_key_sum is not None
    assert inputs.past_log_scale is not None
    scale = inputs.past_log_scale.flatten(0, 1) * math.log2(math.e)
    nearest = scale.round()
    snaps = (scale - nearest).abs() <= _INTEGRAL * scale.abs().clamp_min(1.0)
    whole = nearest.where(snaps, scale.ceil())
    factor = (scale - whole).exp2().masked_fill(snaps | scale.isinf(), 1.0)
    past = launcher.new_sums(launcher.count, 1)
    for x, padding in zip(past, (0.0, 0.0, _LOWEST), strict=True):
        x.fill_(padding)
    count = scale.shape[-1]
    past.key_value[:, 0, :count] = inputs.past_key_value.flatten(0, 1) * factor.unsqueeze(-1)
    past.key_sum[:, 0, :count] = inputs.past_key_sum.flatten(0, 1) * factor
    past.scale[:, 0, :count] = whole.clamp_min(_LOWEST)
    return past, factor


def _copy_state(launcher: Launcher, heads: Heads, last: Sums, results: Results) -> None:
    """Set the state after the last key: real features, natural logarithms of scales."""
    count = launcher.inputs.weight.shape[-2]
    scale = last.scale[:, :count]
    log_scale = (scale * math.log(2)).masked_fill(scale == _LOWEST, -math.inf)
    for to, x in zip(
        results[-3:], (last.key_value[:, :count], last.key_sum[:, :count], log_scale), strict=True
    ):
        heads.of(to.flatten(0, 1)).copy_(x)


def _final_gradients(launcher: Launcher, upstream: Upstream) -> tuple[Tensor, Tensor] | None:
    """Upstream gradients of the state, padded: ``(batch * heads, 1, features, ...)``."""
    if upstream.grad_key_value is None and upstream.grad_key_sum is None:
        return None
    padded_sums = launcher.new_sums(launcher.count, 1)[:2]
    count = launcher.inputs.weight.shape[-2]
    for x, grad in zip(padded_sums, (upstream.grad_key_value, upstream.grad_key_sum), strict=True):
        x.zero_()
        if grad is not None:
            x[:, 0, :count] = grad.flatten(0, 1)
    return padded_sums


def step(inputs: Inputs) -> StepResults:
    """The results of a single position."""
    results = new_step(inputs)
    with _current(inputs.query.device):
        launcher = Launcher(inputs)
        blocks = launcher.blocks("decode_step")
        width = launcher.widths["BV"]
        columns = min(width, blocks.rows)
        if launcher.count < 2 * launcher.processors:
            columns = 16
        past = (inputs.past_key_value, inputs.past_key_sum, inputs.past_log_scale)
        launcher.launch(
            steps.decode_step,
            launcher.count * -(-launcher.value_dim // columns),
            launcher.query, launcher.key, launcher.value, _bytes(inputs.key_mask),
            inputs.weight.contiguous(), None if inputs.bias is None else inputs.bias.contiguous(),
            *(None if x is None else x.contiguous() for x in past), *results,
            *launcher.query.stride()[:3], *launcher.key.stride()[:2],
            *launcher.value.stride()[:2], *results.out.stride()[:3],
            launcher.heads, launcher.groups, inputs.weight.shape[-2],
            math.sqrt(inputs.scale), launcher.pull / 2,
            D=launcher.head_dim, DV=launcher.value_dim, BD=launcher.widths["BD"], BV=columns,
            BW=width, BG=triton.next_power_of_2(launcher.groups), BM=blocks.features,
            PER_HEAD=launcher.products["PER_HEAD"],
            HAS_BIAS=inputs.bias is not None,
            HAS_MASK=inputs.key_mask is not None,
            HAS_PAST=inputs.past_key_value is not None,
            blocks=blocks,
        )  # fmt: skip
    return results


def _bytes(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
