"""Sizes, padded projection and launches of one call.

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

from performers.attention.operators import Inputs
from performers.attention.triton.block_sizes import Blocks, blocks_of
from performers.attention.triton.operators import has_exact_pairs, padded_features

# The least positions of a split, below which combining sums costs more than it gains.
LEAST_SPAN = 512


def padded(size: int) -> int:
    """The power of two, 16 at least, that holds a head_dim."""
    return max(16, triton.next_power_of_2(size))


@cache
def device_of(device: torch.device) -> tuple[int, int]:
    """Compute capability, as 80 for 8.0, and processors; of the CPU for the interpreter."""
    if device.type != "cuda":
        return 90, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Context in which launches go to a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rowwise(x: Tensor) -> Tensor:
    """The tensor with the elements of a row in one piece, as kernels read them.

    Offsets within a block of rows, and of the query heads that share a key head, have 32 bits.
    """
    if x.stride(-1) != 1 or x.stride(-2) >= 1 << 24:
        x = x.contiguous()
    if x.dim() == 5 and (x.shape[2] - 1) * x.stride(2) >= 1 << 31:
        # One query head beside the other.
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


class Projection(NamedTuple):
    """``W sqrt(scale) log2(e)`` in two parts, and ``b log2(e)``, padded; see ``kernels/parts.py``.

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


class Launcher:
    """The kernels of one call: its sizes, its packed projection, and what every launch passes."""

    def __init__(self, inputs: Inputs) -> None:
        """Take the sizes of a call."""
        query, key, value = (rowwise(x) for x in (inputs.query, inputs.key, inputs.value))
        self.inputs = inputs
        self.query, self.key, self.value = query, key, value
        self.batch, self.heads, self.groups, self.length, self.head_dim = query.shape
        self.size, self.value_dim = value.shape[2:]
        self.capability, self.processors = device_of(query.device)
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
        self.form = {"FORM": inputs.kind, "EPSILON": inputs.epsilon}
        # Whether the sums of a state have scales.
        self.scaled = inputs.kind == "exponential"
        self.products = {
            "PER_HEAD": inputs.weight.shape[0] > 1,
            "SPLIT": query.dtype != torch.float32,
            "OPERAND": tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float32,
            # Of float32 operands; three products keep all digits of float32 inputs.
            "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
            **self.form,
        }

    @cached_property
    def projection(self) -> Projection:
        """The packed projection."""
        return Projection.of(self.inputs, self.query.dtype)

    @cached_property
    def segments(self) -> Tensor | None:
        """The packed sequence of each position, in as many registers as there are positions."""
        segments = self.inputs.segments
        return None if segments is None else segments.to(torch.int32)

    @property
    def count(self) -> int:
        """Key heads of all sequences."""
        return self.batch * self.heads

    def blocks(self, kernel: str) -> Blocks:
        """The blocks of a kernel in this call."""
        width = max(self.widths["BD"], self.widths["BV"])
        return blocks_of(kernel, width, self.capability, self.query.dtype)

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

    def splits(self, programs: int, length: int, waves: int = 4) -> int:
        """Splits of a length for which as many programs as each would fill the processors."""
        return max(1, min(-(-waves * self.processors // programs), length // LEAST_SPAN))

    def spans(self, length: int, blocks: Blocks, heads: int) -> tuple[int, int]:
        """Positions of a split, and how many splits a length has."""
        splits = self.splits(heads * (self.features // blocks.features), length)
        span = -(-length // (splits * blocks.rows)) * blocks.rows
        return span, -(-length // span)

    def new_sums(self, heads: int, parts: int) -> Sums:
        """Empty sums of some parts of the keys."""
        shape = (heads, parts, self.features)
        return Sums(self.new(*shape, self.value_dim), self.new(*shape), self.new(*shape))

    def new_rows(self) -> tuple[Tensor, Tensor]:
        """Float32 output rows and their logarithms."""
        shape = (self.batch, self.heads, self.groups, self.length)
        return self.new(*shape, self.value_dim), self.new(*shape)

    def strides(self) -> tuple[int, ...]:
        """Strides of queries, keys and values, but for the last dimension."""
        return (*self.query.stride()[:4], *self.key.stride()[:3], *self.value.stride()[:3])
