"""What the chunked algorithms share: sums, partial rows, their scales, and blocks of rows."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from performers.features import FeatureForm

# Rows of a causal chunk, and features held at a time (elements over batch, heads and rows).
CHUNK = 64
_BLOCK_ELEMENTS = 1 << 19


class Sums(NamedTuple):
    """Sums over keys, as in FavorState: ``(B, H, m, Dv)``, ``(B, H, m)`` and ``(B, H, m)``."""

    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor


class Rows(NamedTuple):
    """Attention not yet divided: ``e^log_scale (numerator, denominator)``.

    Shapes ``(..., L, Dv)``, ``(..., L, 1)`` and ``(..., L, 1)``.
    """

    numerator: Tensor
    denominator: Tensor
    log_scale: Tensor


class Features(NamedTuple):
    """How blocks turn slices of the inputs into features."""

    form: FeatureForm
    root: float
    dtype: torch.dtype

    def of(self, x: Tensor, *, is_query: bool) -> tuple[Tensor | None, Tensor | None]:
        """Base and exponent of the features of ``x``; see ``FeatureForm.decompose``."""
        return self.form.decompose(x.to(self.dtype) * self.root, is_query=is_query)

    def has_exponent(self) -> bool:
        """Whether features need scaling."""
        return self.form.kind != "elementwise"


def query_features(
    base: Tensor | None, exponent: Tensor | None, scale: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Query features times ``e^scale``, divided by their largest, and the log of that divisor.

    The features are in ``dtype``, their own when None, so that small ones need not vanish.
    Without an exponent on the query side the scale is the same for all features: it stays apart.
    """
    if exponent is None:
        assert base is not None
        return base if dtype is None else base.to(dtype), scale[..., :1] if scale.ndim else scale
    exponent = exponent + scale
    peak = exponent.detach().amax(-1, keepdim=True)
    exponent = exponent - peak
    return times(base, (exponent if dtype is None else exponent.to(dtype)).exp()), peak


def merge(left: Rows, right: Rows, *, scaled: bool) -> Rows:
    """The sum of two parts of the same rows."""
    if not scaled:
        return Rows(
            left.numerator + right.numerator,
            left.denominator + right.denominator,
            torch.zeros_like(left.denominator),
        )
    peak = finite(torch.maximum(_log_size(left), _log_size(right)).detach())
    left_weight, right_weight = _weight(left, peak), _weight(right, peak)
    return Rows(
        left.numerator * left_weight + right.numerator * right_weight,
        left.denominator * left_weight + right.denominator * right_weight,
        peak,
    )


def _log_size(rows: Rows) -> Tensor:
    return rows.log_scale + rows.denominator.detach().abs().log()


def _weight(rows: Rows, peak: Tensor) -> Tensor:
    """``e^(log_scale - peak)``; zero for a part without keys, whose scale may be anything."""
    return (rows.log_scale - peak).masked_fill(rows.denominator == 0, -math.inf).exp()


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and zero where there was nothing to attend to."""
    return numerator / denominator.where(denominator != 0, 1.0)


def times(base: Tensor | None, exponential: Tensor) -> Tensor:
    """``base * exponential``, where no base means one."""
    return exponential if base is None else base * exponential


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros in place of rows that take no part, whatever they hold."""
    return x if mask is None else x.where(mask[:, None, :, None], 0.0)


def finite(scale: Tensor) -> Tensor:
    """Zero in place of the minus infinity that stands for no key."""
    return scale.where(scale > -math.inf, 0.0)


def block_rows(heads: tuple[int, ...] | torch.Size, features: Features) -> int:
    """Rows whose features fill a block."""
    per_row = math.prod(heads) * features.form.num_features
    rows = _BLOCK_ELEMENTS // max(per_row, 1)
    return max(CHUNK, rows // CHUNK * CHUNK)


def block_sizes(length: int, rows: int) -> list[int]:
    """Lengths of the blocks of at most ``rows`` that make up ``length``."""
    # Counting blocks, not rows, lets torch.compile keep the length symbolic.
    blocks = -(-length // rows)
    return [rows] * (blocks - 1) + [length - rows * (blocks - 1)] if blocks else []


def cut(x: Tensor | None, sizes: list[int], dim: int) -> Sequence[Tensor | None]:
    """The blocks of ``x`` along ``dim``; Nones for None.

    One split, not a slice for each block: the gradient of a slice is as long as the whole tensor,
    and their sum would take time quadratic in the number of blocks.
    """
    return [None] * len(sizes) if x is None else x.split(sizes, dim)


def direct(function: Callable[..., tuple[Tensor, ...]], *args: Tensor | None) -> tuple[Tensor, ...]:
    """Call a block's function; autograd keeps what it needs."""
    return function(*args)


def checkpointed(
    function: Callable[..., tuple[Tensor, ...]], *args: Tensor | None
) -> tuple[Tensor, ...]:
    """Call a block's function; autograd keeps its inputs and computes the rest again."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
