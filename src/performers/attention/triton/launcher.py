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

_LOG2_E = math.log2(math.e)
# The least positions of a split, below which combining sums costs more than it gains.
LEAST_SPAN = 512
# Parameters of kernels for sums, in the order of `Sums`.
SUMS = ("KV", "KS", "SCALE")
# Parameters of kernels for the strides of a tensor, but for the last.
_STRIDES = {
    "Q": ("sqb", "sqh", "sqg", "sql"),
    "K": ("skb", "skh", "sks"),
    "V": ("svb", "svh", "svs"),
    "SINK_K": ("stb", "sth", "sts"),
    "SINK_V": ("sub", "suh", "sus"),
    "PART_OUT": ("spb", "sph", "spg", "spl"),
    "OUT": ("sob", "soh", "sog", "sol"),
    "GRAD_OUT": ("sgb", "sgh", "sgg", "sgl"),
    "GRAD_Q": ("sxb", "sxh", "sxg", "sxl"),
    "GRAD_K": ("sxb", "sxh", "sxs"),
    "GRAD_V": ("syb", "syh", "sys"),
}
_NO_STRIDES = (0, 0, 0, 0)
# What most launches do without.
_ABSENT = {
    **dict.fromkeys(("START_KV", "START_KS", "START_SCALE", "PART_OUT", "PART_LOG")),
    **dict.fromkeys(_STRIDES["PART_OUT"], 0),
    **dict.fromkeys(("HAS_START", "STATES", "MERGE", "REVERSE"), False),
}


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


def projection(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """``W sqrt(scale) log2(e)`` in two parts, and ``b log2(e)``, padded; see ``kernels/parts.py``.

    Returns:
        ``HI`` of shape ``(1 or heads, features, BD)`` in ``dtype``, that of the queries; ``LO``,
        what it lacks, or itself where it is float32; ``BIAS`` of shape ``(1 or heads, features)``.
    """
    heads, count, width = inputs.weight.shape
    features = padded_features(inputs)
    exact = inputs.weight.new_zeros((heads, features, padded(width)), dtype=torch.float64)
    exact[:, :count, :width] = inputs.weight
    exact *= math.sqrt(inputs.scale) * _LOG2_E
    bias = inputs.weight.new_full((heads, features), -math.inf, dtype=torch.float32)
    bias[:, :count] = 0.0 if inputs.bias is None else inputs.bias * _LOG2_E
    hi = exact.to(dtype)
    lo = hi if dtype == torch.float32 else (exact - hi).to(dtype)
    return {"HI": hi, "LO": lo, "BIAS": bias}


def strides_of(tensors: dict[str, Any]) -> dict[str, int]:
    """Strides of those tensors whose strides are parameters of kernels too."""
    strides: dict[str, int] = {}
    for name in _STRIDES.keys() & tensors.keys():
        numbers = _NO_STRIDES if tensors[name] is None else tensors[name].stride()
        strides.update(zip(_STRIDES[name], numbers, strict=False))
    return strides


class Sums(NamedTuple):
    """Sums over keys of some heads, as kernels read them: scales are binary logarithms."""

    key_value: Tensor
    key_sum: Tensor
    scale: Tensor

    def named(self, prefix: str = "") -> dict[str, Tensor]:
        """The sums as parameters of kernels."""
        return {f"{prefix}{name}": x for name, x in zip(SUMS, self, strict=True)}


class Launcher:
    """The kernels of one call: its sizes, its padded projection, and what every launch passes."""

    def __init__(self, inputs: Inputs) -> None:
        """Take the sizes of a call."""
        self.inputs = inputs
        self.query, self.key, self.value = (rowwise(x) for x in inputs[:3])
        self.batch, self.heads, self.groups, self.length, self.head_dim = self.query.shape
        self.size, self.value_dim = self.value.shape[2:]
        self.widths = (padded(self.head_dim), padded(self.value_dim))
        self.capability, self.processors = device_of(self.query.device)
        self.features = padded_features(inputs)
        self.sinks = 0 if inputs.sink_key is None else inputs.sink_key.shape[2]
        # Whether the sums of a state have scales.
        self.scaled = inputs.kind == "exponential"
        self.pull = inputs.scale if inputs.quadratic else 0.0
        # Beside exact pairs a query's own factor matters, and the mean over draws.
        self.query_pull = self.pull if has_exact_pairs(inputs) else 0.0

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments that all kernels share, by the names of their parameters."""
        inputs, dtype = self.inputs, self.query.dtype
        tensors = {"Q": self.query, "K": self.key, "V": self.value}
        return {
            **_ABSENT,
            **tensors,
            **strides_of(tensors),
            # The packed sequence of each position, in as many registers as there are positions.
            "SEG": None if inputs.segments is None else inputs.segments.to(torch.int32),
            "heads": self.heads,
            "groups": self.groups,
            "length": self.length,
            "size": self.size,
            "features": self.features,
            "sinks": self.sinks,
            "window": inputs.window or 0,
            "offset": inputs.offset,
            "factor": inputs.scale,
            "scale": inputs.scale * _LOG2_E,
            "norm": self.pull * _LOG2_E / 2,
            "log_normalizer": math.log2(inputs.normalizer) if has_exact_pairs(inputs) else 0.0,
            "D": self.head_dim,
            "DV": self.value_dim,
            "BD": self.widths[0],
            "BV": self.widths[1],
            "PER_HEAD": inputs.weight.shape[0] > 1,
            "SPLIT": dtype != torch.float32,
            "OPERAND": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
            # Of float32 operands; three products keep all digits of float32 inputs.
            "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
            "FORM": inputs.kind,
            "EPSILON": inputs.epsilon,
            "CAUSAL": inputs.is_causal,
            "HAS_SEG": inputs.segments is not None,
            "HAS_WINDOW": inputs.window is not None,
            "HAS_SINKS": self.sinks > 0,
        }

    @cached_property
    def projection(self) -> dict[str, Tensor]:
        """The padded projection, as kernels read it."""
        return projection(self.inputs, self.query.dtype)

    @property
    def count(self) -> int:
        """Key heads of all sequences."""
        return self.batch * self.heads

    def blocks(self, kernel: str) -> Blocks:
        """The blocks of a kernel in this call."""
        return blocks_of(kernel, max(self.widths), self.capability, self.query.dtype)

    def new(self, *shape: int) -> Tensor:
        """A float32 tensor."""
        return self.query.new_empty(shape, dtype=torch.float32)

    def run(self, kernel: Any, programs: int, blocks: Blocks, **given: Any) -> None:
        """Launch a kernel with what is given, and else with what it reads of the call."""
        given = {"BM": blocks.features, "BT": blocks.rows, **given, **strides_of(given)}
        shared = self.arguments
        arguments = [given[n] if n in given else shared[n] for n in kernel.arg_names]
        self.launch(kernel, programs, *arguments, blocks=blocks)

    def launch(
        self, kernel: Any, programs: int, *args: Any, blocks: Blocks, **constants: Any
    ) -> None:
        """Launch as many programs of a kernel, unless there are none."""
        if programs:
            kernel[(programs,)](
                *args, num_warps=blocks.warps, num_stages=blocks.stages, **constants
            )

    def query_blocks(self, blocks: Blocks) -> int:
        """Blocks of rows of all query heads."""
        return -(-self.length // blocks.rows) * self.count * self.groups

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
