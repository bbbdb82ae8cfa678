"""From the arguments of an operator to launches of kernels.

Nothing is read back from the device, so calls can be captured in a CUDA graph.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from performers.attention.native.operators import Gradients, Inputs, Upstream
from performers.attention.triton import rows, sums
from performers.attention.triton.operators import (
    Results,
    new_gradients,
    new_results,
    padded_features,
)

# The least positions of a split, below which combining sums costs more than it gains.
LEAST_SPAN = 512


class Blocks(NamedTuple):
    """The shape of a kernel's blocks: features and rows at a time, warps, stages of loads."""

    features: int
    rows: int
    warps: int
    stages: int


# By kernel: blocks for a head_dim up to 64, 128 and 256, on sm_80 and on sm_90 and later. They are
# the largest that compile without spills; tests/attention/triton/test_compiles.py keeps them so.
_TABLE: dict[str, dict[int, tuple[Blocks, Blocks]]] = {
    "key_norms": {
        64: (Blocks(0, 64, 4, 1), Blocks(0, 64, 4, 1)),
        128: (Blocks(0, 32, 4, 1), Blocks(0, 32, 4, 1)),
        256: (Blocks(0, 16, 4, 1), Blocks(0, 16, 4, 1)),
    },
    "key_sums": {
        64: (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
        128: (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
        256: (Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1)),
    },
    "combine": {
        64: (Blocks(16, 0, 4, 1), Blocks(16, 0, 4, 1)),
        128: (Blocks(16, 0, 4, 1), Blocks(16, 0, 4, 1)),
        256: (Blocks(16, 0, 8, 1), Blocks(16, 0, 8, 1)),
    },
    "read_rows": {
        64: (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2)),
        128: (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
        256: (Blocks(32, 32, 4, 1), Blocks(32, 64, 8, 1)),
    },
    "row_terms": {
        64: (Blocks(0, 64, 4, 1), Blocks(0, 64, 4, 1)),
        128: (Blocks(0, 32, 4, 1), Blocks(0, 32, 4, 1)),
        256: (Blocks(0, 16, 4, 1), Blocks(0, 16, 4, 1)),
    },
    "query_sums": {
        64: (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
        128: (Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2)),
        256: (Blocks(64, 64, 8, 1), Blocks(64, 64, 8, 1)),
    },
    "query_gradients": {
        64: (Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 2)),
        128: (Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)),
        256: (Blocks(32, 32, 8, 1), Blocks(32, 64, 8, 1)),
    },
    "key_gradients": {
        64: (Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 2)),
        128: (Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)),
        256: (Blocks(32, 32, 8, 1), Blocks(32, 64, 8, 1)),
    },
}
# Float32 operands are twice as large, and each product is three.
_TABLE_FLOAT32: dict[str, dict[int, tuple[Blocks, Blocks]]] = {}


def blocks_of(kernel: str, width: int, capability: int, operand: torch.dtype) -> Blocks:
    """The blocks of a kernel for a padded head_dim, the larger of those of keys and values."""
    table = _TABLE_FLOAT32 if operand == torch.float32 and kernel in _TABLE_FLOAT32 else _TABLE
    bucket = next(size for size in (64, 128, 256) if width <= size)
    return table[kernel][bucket][capability >= 90]


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


class Launcher:
    """The kernels of one call: its sizes, its packed projection, and what every launch passes."""

    def __init__(self, inputs: Inputs) -> None:
        """Pack the projection of a call."""
        query, key, value = (rowwise(x) for x in (inputs.query, inputs.key, inputs.value))
        self.inputs = inputs
        self.query, self.key, self.value = query, key, value
        self.batch, self.heads, self.groups, self.length, self.head_dim = query.shape
        self.size, self.value_dim = value.shape[2:]
        self.capability, self.processors = _device(query.device)
        self.projection = Projection.of(inputs, query.dtype)
        self.features = self.projection.hi.shape[1]
        self.norm = inputs.scale * math.log2(math.e) / 2 if inputs.quadratic else 0.0
        self.pull = inputs.scale if inputs.quadratic else 0.0
        self.operand = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
        self.widths = {
            "D": self.head_dim,
            "DV": self.value_dim,
            "BD": padded(self.head_dim),
            "BV": padded(self.value_dim),
        }
        self.products = {
            "PER_HEAD": self.projection.hi.shape[0] > 1,
            "SPLIT": query.dtype != torch.float32,
            "OPERAND": tl.bfloat16 if self.operand == torch.bfloat16 else tl.float32,
            # Of float32 operands; three products keep all digits of float32 inputs.
            "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        }

    @property
    def count(self) -> int:
        """Key heads of all sequences."""
        return self.batch * self.heads

    def blocks(self, kernel: str) -> Blocks:
        """The blocks of a kernel in this call."""
        width = max(self.widths["BD"], self.widths["BV"])
        return blocks_of(kernel, width, self.capability, self.operand)

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

    def key_norms(self, slots: int, delay: int = 0, reverse: bool = False) -> Tensor:
        """Norms of the keys of all slots, ``(batch * heads, slots)``."""
        inputs, blocks = self.inputs, self.blocks("key_norms")
        norms = self.new(self.count, slots)
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
        return norms

    def total_sums(self, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
            return tuple(x.squeeze(1) for x in parts)  # type: ignore[return-value]
        total = tuple(x[:, 0] for x in self.new_sums(self.count, 1))
        blocks = self.blocks("combine")
        self.launch(
            sums.combine,
            self.features // blocks.features * self.count,
            *parts, None, None, None, *total, None,
            self.size, span, splits, self.features,
            DV=self.value_dim, BV=self.widths["BV"], BM=blocks.features,
            HAS_START=False, HAS_SEG=False, REVERSE=False,
            blocks=blocks,
        )  # fmt: skip
        return total  # type: ignore[return-value]

    def new_sums(self, heads: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Empty sums of some parts of the keys."""
        shape = (heads, parts, self.features)
        return self.new(*shape, self.value_dim), self.new(*shape), self.new(*shape)

    def read_rows(self, total: tuple[Tensor, ...], out: Tensor, log: Tensor) -> None:
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

    def row_terms(self, out: Tensor, grad_out: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
        """``grad_out . out`` of each row, and its logarithm for the backward kernels."""
        blocks = self.blocks("row_terms")
        delta, ready = torch.empty_like(log), torch.empty_like(log)
        self.launch(
            sums.row_terms,
            -(-self.length // blocks.rows) * self.count * self.groups,
            out, grad_out, log, delta, ready, *out.stride()[:4], *grad_out.stride()[:4],
            self.heads, self.groups, self.length,
            DV=self.value_dim, BV=self.widths["BV"], BT=blocks.rows,
            blocks=blocks,
        )  # fmt: skip
        return delta, ready

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
            HAS_START=False, STATES=False, HAS_SEG=False, REVERSE=False,
            blocks=blocks,
        )  # fmt: skip
        # Split after split, the same in every run.
        return grad_kv.sum(1), grad_ks.sum(1)

    def query_gradients(
        self,
        grad_out: Tensor,
        delta: Tensor,
        log: Tensor,
        total: tuple[Tensor, ...],
        grad_query: Tensor,
        *,
        pull: float = 0.0,
        add: bool = False,
    ) -> None:
        """Gradients of bidirectional queries."""
        blocks = self.blocks("query_gradients")
        self.launch(
            rows.query_gradients,
            -(-self.length // blocks.rows) * self.count * self.groups,
            self.query, grad_out, delta, log, *self.projection, *total, grad_query,
            *self.query.stride()[:4], *grad_out.stride()[:4], *grad_query.stride()[:4],
            self.heads, self.groups, self.length, self.features, pull,
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


def forward(inputs: Inputs) -> Results:
    """The results of a call."""
    with _current(inputs.query.device):
        return _bidirectional(Launcher(inputs))


def backward(upstream: Upstream, inputs: Inputs, results: Results) -> Gradients:
    """The gradients of a call."""
    with _current(inputs.query.device):
        return _bidirectional_gradients(Launcher(inputs), rowwise(upstream.grad_out), results)


def _bidirectional(launcher: Launcher) -> Results:
    results = new_results(launcher.inputs)
    norms = launcher.key_norms(launcher.size)
    total = launcher.total_sums(norms)
    launcher.read_rows(total, results.out, results.log_normaliser)
    return results._replace(
        key_norm=norms, key_value=total[0], key_sum=total[1], log_scale=total[2]
    )


def _bidirectional_gradients(launcher: Launcher, grad_out: Tensor, results: Results) -> Gradients:
    gradients = new_gradients(launcher.inputs)
    delta, log = launcher.row_terms(results.out, grad_out, results.log_normaliser)
    total = results.key_value, results.key_sum, results.log_scale
    launcher.query_gradients(grad_out, delta, log, total, gradients.query)
    of_sums = launcher.total_gradients(grad_out, delta, log, results.log_scale)
    launcher.key_gradients(
        results.key_norm, results.log_scale, of_sums, gradients.key, gradients.value
    )
    return gradients


def _bytes(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
