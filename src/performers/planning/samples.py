"""Sample queries, keys and values: checked once, split in two, brought to another length."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from performers.features.base import resolve_scale


@dataclass(frozen=True)
class Samples:
    """A batch of sequences as attention receives them.

    Attributes:
        query: Shape ``(B, H, L, D)``.
        key: Shape ``(B, Hkv, S, D)``.
        value: Shape ``(B, Hkv, S, Dv)``.
        key_mask: Bool, shape ``(B, S)``, True where a key takes part, or None.
        scale: The factor on ``q . k``.
        is_causal: Query ``i`` sees keys ``0..i`` only.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    scale: float
    is_causal: bool

    def rows(self, start: int, stop: int) -> "Samples":
        """Some of the sequences."""
        mask = None if self.key_mask is None else self.key_mask[start:stop]
        return replace(
            self,
            query=self.query[start:stop],
            key=self.key[start:stop],
            value=self.value[start:stop],
            key_mask=mask,
        )

    def split(self) -> tuple["Samples", "Samples"]:
        """Sequences to calibrate on, and others to measure on.

        The first half of the rows (rounded up), and the rest. A single row is cut in the middle:
        its second half calibrates, and its beginning, which has the sinks, measures.
        """
        batch = self.query.shape[0]
        if batch > 1:
            return self.rows(0, batch - batch // 2), self.rows(batch - batch // 2, batch)
        length, size = self.query.shape[2] // 2, self.key.shape[2] // 2
        mask = (None, None) if self.key_mask is None else self.key_mask.split(size, dim=1)[:2]
        first, second = (
            replace(
                self,
                query=self.query[:, :, half * length : (half + 1) * length],
                key=self.key[:, :, half * size : (half + 1) * size],
                value=self.value[:, :, half * size : (half + 1) * size],
                key_mask=mask[half],
            )
            for half in range(2)
        )
        return second, first

    def at_length(self, length: int) -> "Samples":
        """The first row, cut or repeated to ``length`` queries and keys in proportion."""
        size = max(1, round(self.key.shape[2] * length / self.query.shape[2]))

        def fitted(x: Tensor, dim: int, count: int) -> Tensor:
            times = [1] * x.ndim
            times[dim] = -(-count // x.shape[dim])
            return x.repeat(times).narrow(dim, 0, count).contiguous()

        row = self.rows(0, 1)
        return replace(
            row,
            query=fitted(row.query, 2, length),
            key=fitted(row.key, 2, size),
            value=fitted(row.value, 2, size),
            key_mask=None if row.key_mask is None else fitted(row.key_mask, 1, size),
        )

    def counted(self) -> Tensor | None:
        """Queries ``(B, L)`` that are not padding, where a mask and equal lengths tell."""
        return None if self.query.shape[2] != self.key.shape[2] else self.key_mask


def checked_samples(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    *,
    is_causal: bool,
    key_mask: Tensor | None,
    scale: float | None,
    seed: int,
) -> Samples:
    """Check what `plan` was given; standard normal values where there are none."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is not None and (x.ndim != 4 or not x.is_floating_point()):
            raise ValueError(
                f"{name} must be a floating-point tensor of shape (batch, heads, length, "
                f"head_dim), got {x.dtype} {tuple(x.shape)}"
            )
    batch, heads, length, head_dim = query.shape
    key_heads, size = key.shape[1:3]
    if query.numel() == 0:
        raise ValueError(f"query must not be empty, got shape {tuple(query.shape)}")
    if key.shape[0] != batch or key.shape[3] != head_dim or size == 0:
        raise ValueError(
            f"key must have shape ({batch}, Hkv, S, {head_dim}) to go with query "
            f"{tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"key must have a number of heads that divides that of query ({heads}), got {key_heads}"
        )
    if is_causal and length != size:
        raise ValueError(f"is_causal needs as many keys as queries, got {size} and {length}")
    if batch == 1 and min(length, size) < 2:
        raise ValueError(
            "query and key must have at least 2 positions when there is one row, which is cut into "
            f"two, got {length} and {size}; pass more rows"
        )
    if value is None:
        random = torch.Generator().manual_seed(seed)
        value = torch.randn(key.shape, generator=random, device="cpu").to(key)
    if value.shape[:3] != key.shape[:3] or value.shape[3] == 0:
        raise ValueError(
            f"value must have shape ({batch}, {key_heads}, {size}, Dv) to go with key "
            f"{tuple(key.shape)}, got {tuple(value.shape)}"
        )
    if not (query.dtype == key.dtype == value.dtype and query.device == key.device == value.device):
        raise ValueError(
            "query, key and value must have one dtype and device, got "
            f"{[(str(x.dtype), str(x.device)) for x in (query, key, value)]}"
        )
    if key_mask is not None:
        if key_mask.dtype != torch.bool or key_mask.shape != (batch, size):
            raise ValueError(
                f"key_mask must be a bool tensor of shape ({batch}, {size}), True = takes part, "
                f"got {key_mask.dtype} {tuple(key_mask.shape)}"
            )
        key_mask = key_mask.to(key.device)
    for name, x in (("query", query), ("key", key), ("value", value)):
        seen = x.isfinite()
        if key_mask is not None and name != "query":
            seen = seen | ~key_mask[:, None, :, None]
        if not bool(seen.all()):
            raise ValueError(f"{name} must be finite, but holds NaN or infinity")
    samples = Samples(
        query.detach(),
        key.detach(),
        value.detach(),
        key_mask,
        resolve_scale(scale, head_dim),
        bool(is_causal),
    )
    for part in samples.split():
        _check_part(part, batch)
    return samples


def _check_part(part: Samples, batch: int) -> None:
    where = "every row" if batch > 1 else "both halves of the one row"
    value = part.value
    if part.key_mask is not None:
        if not bool(part.key_mask.any(1).all()):
            raise ValueError(
                f"key_mask must leave at least one key in {where}; leave out what is padding"
            )
        value = value.masked_fill(~part.key_mask[:, None, :, None], 0.0)
    sizes = value.abs().flatten(1).amax(1)
    if not bool((sizes > 0).all()) or not math.isfinite(float(sizes.max())):
        raise ValueError(
            f"value must not be zero throughout in {where}: a relative error has no meaning there"
        )
