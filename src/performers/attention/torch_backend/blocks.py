"""Parts of the chunked algorithms: sums over keys, rows in parts, their scales, and blocks."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from performers.attention.call import AttentionCall, masked
from performers.features import FeatureForm
from performers.features.form import times

# Rows of a causal chunk, and features held at a time (elements over batch, heads and rows): what
# caches of a CPU hold, and elsewhere enough for launches to cost less than the work.
CHUNK = 64
_BLOCK_ELEMENTS = {"cpu": 1 << 19}
_ACCELERATOR_BLOCK_ELEMENTS = 1 << 27


class Sums(NamedTuple):
    """Sums over keys, as in FavorState: ``(B, H, m, Dv)``, ``(B, H, m)`` and ``(B, H, m)``."""

    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor

    def with_keys(self, base: Tensor | None, exponent: Tensor | None, value: Tensor) -> "Sums":
        """And keys with features ``(B, H, T, m)`` and values ``(B, H, T, Dv)``."""
        key_value, key_sum, log_scale = self
        if exponent is None:
            assert base is not None
            phi = base
        else:
            log_scale = torch.maximum(log_scale, exponent.detach().amax(-2))
            scale = finite(log_scale)
            phi = times(base, (exponent - scale.unsqueeze(-2)).exp())
            decay = (self.log_scale - scale).exp()
            key_value, key_sum = key_value * decay.unsqueeze(-1), key_sum * decay
        return Sums(key_value + phi.mT @ value, key_sum + phi.sum(-2), log_scale)

    def plus(self, other: "Sums") -> "Sums":
        """Over the keys of both."""
        log_scale = torch.maximum(self.log_scale, other.log_scale)
        scale = finite(log_scale)
        left, right = (self.log_scale - scale).exp(), (other.log_scale - scale).exp()
        return Sums(
            self.key_value * left.unsqueeze(-1) + other.key_value * right.unsqueeze(-1),
            self.key_sum * left + other.key_sum * right,
            log_scale,
        )


class Rows(NamedTuple):
    """Attention not yet divided: ``e^log_scale (numerator, denominator)``.

    Shapes ``(..., L, Dv)``, ``(..., L, 1)`` and ``(..., L, 1)``.
    """

    numerator: Tensor
    denominator: Tensor
    log_scale: Tensor

    def out(self) -> Tensor:
        """The quotient, and zero where there is nothing to attend to."""
        return self.numerator / self.denominator.where(self.denominator != 0, 1.0)

    def plus(self, other: "Rows", *, scaled: bool = True) -> "Rows":
        """The sum of two parts of the same rows, whose scales are zero unless ``scaled``."""
        if not scaled:
            zero = torch.zeros_like(self.denominator)
            return Rows(
                self.numerator + other.numerator, self.denominator + other.denominator, zero
            )
        peak = finite(torch.maximum(self._log_size(), other._log_size()).detach())
        left, right = self._weight(peak), other._weight(peak)
        return Rows(
            self.numerator * left + other.numerator * right,
            self.denominator * left + other.denominator * right,
            peak,
        )

    def _log_size(self) -> Tensor:
        return self.log_scale + self.denominator.detach().abs().log()

    def _weight(self, peak: Tensor) -> Tensor:
        """``e^(log_scale - peak)``; zero for a part without keys, whose scale may be anything."""
        weight = (self.log_scale - peak).masked_fill(self.denominator == 0, -math.inf).exp()
        return weight.to(self.numerator.dtype)


class Features(NamedTuple):
    """Features of slices of the inputs, for blocks."""

    form: FeatureForm
    root: float
    dtype: torch.dtype

    @classmethod
    def of_call(cls, call: AttentionCall) -> "Features":
        """Those of a call."""
        return cls(call.form.to(call.dtype), math.sqrt(call.factor), call.dtype)

    def of(self, x: Tensor, *, is_query: bool) -> tuple[Tensor | None, Tensor | None]:
        """Base and exponent of the features of ``x``; see ``FeatureForm.decompose``."""
        return self.form.decompose(x.to(self.dtype) * self.root, is_query=is_query)

    def of_keys(
        self, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Base and exponent of keys ``(B, H, T, D)``, and values; masked, their features are 0."""
        base, exponent = self.of(masked(key, mask), is_query=False)
        if exponent is None:
            assert base is not None
            base = masked(base, mask)
        elif mask is not None:
            exponent = exponent.masked_fill(~mask[:, None, :, None], -math.inf)
        return base, exponent, masked(value.to(self.dtype), mask)

    def beside_exact_pairs(self, rows: Rows, query: Tensor) -> Rows:
        """Rows with what cancels without exact pairs: a query's factor, and the mean over draws."""
        half_norm = query.to(self.dtype).square().sum(-1, keepdim=True) * self.root**2 / 2
        sign = 1 if self.form.kind == "trigonometric" else -1
        log_factor = sign * half_norm + math.log(self.form.normalizer)
        return Rows(rows.numerator, rows.denominator, rows.log_scale + log_factor)

    def has_exponent(self) -> bool:
        """True if features need scaling."""
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
        scale = finite(scale[..., :1]) if scale.ndim else scale
        return base if dtype is None else base.to(dtype), scale
    # A feature that no key has, at the scale minus infinity, must not set the largest.
    exponent = exponent + scale
    peak = finite(exponent.detach().amax(-1, keepdim=True))
    exponent = exponent - peak
    return times(base, (exponent if dtype is None else exponent.to(dtype)).exp()), peak


def read(features: Features, query: Tensor, sums: Sums) -> Rows:
    """Queries ``(B, H, G, T, D)`` against all that the sums hold."""
    base, exponent = features.of(query.flatten(2, 3), is_query=True)
    phi, scale = query_features(base, exponent, sums.log_scale.unsqueeze(-2))
    rows = (
        phi @ sums.key_value,
        phi @ sums.key_sum.unsqueeze(-1),
        scale.expand(*phi.shape[:-1], 1),
    )
    return Rows(*(x.unflatten(2, query.shape[2:4]) for x in rows))


def softmax_rows(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Rows:
    """Sums of ``exp(q . k)`` over the keys ``(..., n, D)`` that queries ``(..., T, D)`` see."""
    logits = (query @ key.mT).masked_fill(~seen, -math.inf)
    peak = finite(logits.detach().amax(-1, keepdim=True))
    weights = (logits - peak).exp()
    return Rows(weights @ value, weights.sum(-1, keepdim=True), peak)


def finite(scale: Tensor) -> Tensor:
    """Zero in place of the minus infinity that stands for no key."""
    return scale.where(scale > -math.inf, 0.0)


def block_rows(
    heads: tuple[int, ...] | torch.Size, features: Features, device: torch.device
) -> int:
    """Rows whose features fill a block."""
    per_row = math.prod(heads) * features.form.num_features
    elements = _BLOCK_ELEMENTS.get(device.type, _ACCELERATOR_BLOCK_ELEMENTS)
    rows = elements // max(per_row, 1)
    return max(CHUNK, rows // CHUNK * CHUNK)


def block_sizes(length: int, rows: int) -> list[int]:
    """Lengths of the blocks of at most ``rows`` that make up ``length``."""
    # Counting blocks, not rows, lets torch.compile keep the length symbolic.
    blocks = -(-length // rows)
    return [rows] * (blocks - 1) + [length - rows * (blocks - 1)] if blocks else []


def in_blocks(
    step: Callable[..., tuple[Tensor, ...]],
    sizes: list[int],
    inputs: Sequence[tuple[Tensor | None, int]],
    carry: tuple[Tensor, ...] = (),
    *,
    keep: bool | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Call a function on one block of its inputs after the other.

    Args:
        step: From a block of each input and the carry to rows and the next carry.
        sizes: Lengths of the blocks.
        inputs: Tensors, or None, and the dimension to cut each along.
        carry: The first carry.
        keep: Let autograd keep what a step computes, in place of its inputs alone; None where
            there is one block.

    Returns:
        The rows of all blocks, joined along the last dimension but one, and the last carry.
    """
    keep = len(sizes) == 1 if keep is None else keep
    # One split, not a slice for each block: the gradient of a slice is as long as the whole
    # tensor, and their sum would take time quadratic in the number of blocks.
    cut = [[None] * len(sizes) if x is None else x.split(sizes, dim) for x, dim in inputs]
    parts: list[tuple[Tensor, ...]] = []
    for block in zip(*cut, strict=True):
        if keep or not torch.is_grad_enabled():
            results = step(*block, *carry)
        else:
            results = checkpoint(
                step, *block, *carry, use_reentrant=False, preserve_rng_state=False
            )
        # torch 2.7 compiles no slice of a named tuple.
        results = tuple(results)
        count = len(results) - len(carry)
        parts.append(results[:count])
        carry = results[count:]
    if len(parts) == 1:
        return parts[0], carry
    return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True)), carry


def sum_keys(
    call: AttentionCall, features: Features, sums: Sums, sizes: list[int], *, keep: bool | None
) -> Sums:
    """The sums and, added to them, the keys of a call, one block after the other."""

    def step(key: Tensor, value: Tensor, mask: Tensor | None, *sums: Tensor) -> Sums:
        return Sums(*sums).with_keys(*features.of_keys(key, value, mask))

    keys = [(call.key, 2), (call.value, 2), (call.key_mask, 1)]
    return Sums(*in_blocks(step, sizes, keys, sums, keep=keep)[1])
