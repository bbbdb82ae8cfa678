"""Linear attention of one layer as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from performers.attention import FavorState, ListedKeys, favor_attention, favor_attention_weights
from performers.features import FeatureMap, LearnedFeatures


class FavorAttention(nn.Module):
    """Attention through random features, exact within a window, at sinks and at listed keys.

    Queries, keys and values are projected by the caller. Arguments are as in ``favor_attention``.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        *,
        window: int | None = None,
        sinks: int = 0,
        listed_keys: ListedKeys | None = None,
    ) -> None:
        # Not super(): PerformerAttention is an nn.MultiheadAttention, too.
        nn.Module.__init__(self)
        self.feature_map = feature_map
        self.window, self.sinks = window, sinks
        self.buckets = listed_keys

    def extra_repr(self) -> str:
        """Window and sinks."""
        return f"window={self.window}, sinks={self.sinks}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        return_state: bool = False,
        **options: Any,
    ) -> tuple[Tensor, FavorState | None]:
        """Compute the output ``(B, H, L, Dv)``, and the state or None.

        Arguments are those of ``favor_attention``, except that ``cu_seqlens`` are the boundaries of
        packed sequences along all rows laid end to end.

        Raises:
            ValueError: As in ``favor_attention``, or packed sequences meet listed keys.
        """
        batch, _, length, _ = query.shape
        if cu_seqlens is not None:
            if self.buckets is not None:
                raise ValueError(
                    "a model converted with listed_keys takes no packed sequences (position_ids "
                    "that begin again): its lists are made from one whole sequence; pass a padded "
                    "batch with an attention_mask"
                )
            query, key, value = (end_to_end(x) for x in (query, key, value))
            key_mask = None if key_mask is None else key_mask.reshape(1, -1)
            positions = None if positions is None else positions.reshape(1, -1)
        # torch 2.7 compiles update, but no |= of dictionaries.
        options.update(key_mask=key_mask, cu_seqlens=cu_seqlens, positions=positions)
        options.update(return_state=return_state, **self._exact_pairs())
        result: Any = favor_attention(query, key, value, self.feature_map, **options)
        out, state = result if return_state else (result, None)
        if cu_seqlens is not None:
            out = out.squeeze(0).unflatten(1, (batch, length)).transpose(0, 1)
        return out, state

    def weights(self, query: Tensor, key: Tensor, **options: Any) -> Tensor:
        """Compute the matrix ``(B, H, L, S)`` that `forward` implies; quadratic.

        Arguments are those of ``favor_attention_weights``.
        """
        options.update(self._exact_pairs())
        return favor_attention_weights(query, key, self.feature_map, **options)

    def _exact_pairs(self) -> dict[str, Any]:
        return {"window": self.window, "sinks": self.sinks, "listed_keys": self.buckets}

    def calibrate_(
        self,
        query: Tensor,
        key: Tensor,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        *,
        is_causal: bool = False,
    ) -> FavorAttention:
        """Fit the estimator and the lists of keys to sample queries and keys; calls add up.

        Pairs that are exact do not count. Arguments are those of ``FeatureMap.calibrate_``.

        Raises:
            ValueError: An argument does not fit, holds NaN or infinity, or leaves no pair.
        """
        exact: dict[str, Any] = {"window": self.window, "sinks": self.sinks}
        self.feature_map.calibrate_(query, key, key_mask, scale, is_causal=is_causal, **exact)
        if self.buckets is not None:
            self.buckets.calibrate_(query)
        return self

    def learn_(self, num_heads: int | None = None) -> FavorAttention:
        """Make the features trained parameters that start from their present values."""
        if not isinstance(self.feature_map, LearnedFeatures):
            self.feature_map = LearnedFeatures(self.feature_map, num_heads=num_heads)
        return self


def end_to_end(x: Tensor) -> Tensor:
    """Lay the rows of ``(B, H, L, D)`` end to end, as ``(1, H, B L, D)``."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
