"""Sample queries, keys and values: checked, split in two, cut or repeated to a length."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.features import SoftmaxFeatures
from performers.features.base import resolve_scale


@dataclass(frozen=True)
class Samples:
    """A batch of sequences as attention receives them.

    Shapes are those of ``favor_attention``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    scale: float
    is_causal: bool

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a call of attention."""
        return {"is_causal": self.is_causal, "key_mask": self.key_mask, "scale": self.scale}

    @property
    def query_mask(self) -> Tensor | None:
        """Queries ``(B, L)`` that are not padding; None where L and S differ, or without a mask."""
        return None if self.query.shape[2] != self.key.shape[2] else self.key_mask

    def split(self) -> tuple["Samples", "Samples"]:
        """Sequences to calibrate on, and others to measure on.

        The first half of the rows (rounded up), and the rest. A single row is cut in the middle:
        its second half calibrates, and its beginning, which has the sinks, measures.
        """
        batch, length, size = self.query.shape[0], self.query.shape[2] // 2, self.key.shape[2] // 2
        if batch > 1:
            half = batch - batch // 2
            return self.part(slice(half)), self.part(slice(half, None))
        end = self.part(slice(1), slice(length, 2 * length), slice(size, 2 * size))
        return end, self.part(slice(1), slice(length), slice(size))

    def at_length(self, length: int) -> "Samples":
        """The first row, cut or repeated to ``length`` queries and keys in proportion."""
        size = max(1, round(self.key.shape[2] * length / self.query.shape[2]))
        queries, keys = (
            torch.arange(count, device=x.device) % x.shape[2]
            for count, x in ((length, self.query), (size, self.key))
        )
        return self.part(slice(1), queries, keys)

    def part(
        self,
        rows: slice,
        queries: slice | Tensor = slice(None),
        keys: slice | Tensor = slice(None),
    ) -> "Samples":
        """Some of the sequences, and some of their positions."""
        return replace(
            self,
            query=self.query[rows, :, queries],
            key=self.key[rows, :, keys],
            value=self.value[rows, :, keys],
            key_mask=None if self.key_mask is None else self.key_mask[rows, keys],
        )


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
    """Check the tensors of `plan`; values are standard normal when None, masked ones zero."""
    if value is None:
        random = torch.Generator().manual_seed(seed)
        value = torch.randn(key.shape, generator=random, device="cpu").to(key)
    features = SoftmaxFeatures(max((1, *query.shape[-1:])), 1, generator=torch.Generator())
    AttentionCall(
        query,
        key,
        value,
        features.to(query.device),
        is_causal=is_causal,
        key_mask=key_mask,
        scale=scale,
    ).checked()
    batch, length, size = query.shape[0], query.shape[2], key.shape[2]
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    if batch == 1 and min(length, size) < 2:
        raise ValueError(
            "query and key must have at least 2 positions when there is one row, which is cut into "
            f"two, got {length} and {size}; pass more rows"
        )
    if key_mask is not None:
        key_mask = key_mask.to(key.device)
        key, value = (x.masked_fill(~key_mask[:, None, :, None], 0.0) for x in (key, value))
    query, key, value = query.detach(), key.detach(), value.detach()
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} must be finite, but holds NaN or infinity")
    samples = Samples(
        query, key, value, key_mask, resolve_scale(scale, query.shape[3]), bool(is_causal)
    )
    where = "every row" if batch > 1 else "both halves of the one row"
    for part in samples.split():
        if part.key_mask is not None and not bool(part.key_mask.any(1).all()):
            raise ValueError(
                f"key_mask must leave at least one key in {where}; leave out what is padding"
            )
        if not bool((part.value != 0).flatten(1).any(1).all()):
            raise ValueError(
                f"value must not be zero throughout in {where}: a relative error has no meaning "
                "there"
            )
    return samples
