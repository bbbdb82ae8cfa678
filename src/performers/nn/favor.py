"""Linear attention of one layer as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from performers.attention import FavorState, ListedKeys, favor_attention, favor_attention_weights
from performers.features import FeatureMap, LearnedFeatures


class FavorAttention(nn.Module):
    """Attention through random features, exact for near, first and listed keys.

    Projections of queries, keys and values belong to the caller.

    Args:
        feature_map: The features.
        window: As in ``favor_attention``.
        sinks: As in ``favor_attention``.
        listed_keys: As in ``favor_attention``.
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
        """The exact terms."""
        return f"window={self.window}, sinks={self.sinks}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scale: float | None = None,
        state: FavorState | None = None,
        return_state: bool = False,
        backend: str | None = None,
    ) -> tuple[Tensor, FavorState | None]:
        """Attend.

        Args:
            query: Shape ``(B, H, L, D)``.
            key: Shape ``(B, Hkv, S, D)``.
            value: Shape ``(B, Hkv, S, Dv)``.
            is_causal: A query sees itself and what precedes it.
            key_mask: Shape ``(B, S)`` bool, True where a key takes part.
            cu_seqlens: Boundaries of packed sequences along all rows laid end to end.
            scale: Factor of the scores; None: ``D ** -0.5``.
            state: The past.
            return_state: Also return the state after these tokens.
            backend: As in ``favor_attention``.

        Returns:
            Shape ``(B, H, L, Dv)``, and the state or None.

        Raises:
            ValueError: As in ``favor_attention``, or packed sequences with listed keys.
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
        options: dict[str, Any] = {
            "is_causal": is_causal,
            "key_mask": key_mask,
            "cu_seqlens": cu_seqlens,
            "scale": scale,
            "window": self.window,
            "sinks": self.sinks,
            "listed_keys": self.buckets,
            "state": state,
            "return_state": return_state,
            "backend": backend,
        }
        result: Any = favor_attention(query, key, value, self.feature_map, **options)
        out, state = result if return_state else (result, None)
        if cu_seqlens is not None:
            out = out.squeeze(0).unflatten(1, (batch, length)).transpose(0, 1)
        return out, state

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        *,
        is_causal: bool = False,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The matrix ``(B, H, L, S)`` that `forward` implies; quadratic.

        Args:
            query: Shape ``(B, H, L, D)``.
            key: Shape ``(B, Hkv, S, D)``.
            is_causal: A query sees itself and what precedes it.
            key_mask: Shape ``(B, S)`` bool, True where a key takes part.
            scale: Factor of the scores.
        """
        return favor_attention_weights(
            query,
            key,
            self.feature_map,
            is_causal=is_causal,
            key_mask=key_mask,
            scale=scale,
            window=self.window,
            sinks=self.sinks,
            listed_keys=self.buckets,
        )

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

        Pairs that are exact do not count.

        Args:
            query: Shape ``(B, H, L, D)``.
            key: Shape ``(B, Hkv, S, D)``.
            key_mask: Shape ``(B, S)`` bool, True where a key takes part.
            scale: Factor of the scores.
            is_causal: A query sees itself and what precedes it.

        Returns:
            Self.

        Raises:
            ValueError: An argument does not fit, holds NaN or infinity, or leaves no pair.
        """
        self.feature_map.calibrate_(
            query,
            key,
            key_mask,
            scale,
            is_causal=is_causal,
            window=self.window,
            sinks=self.sinks,
        )
        if self.buckets is not None:
            self.buckets.calibrate_(query)
        return self

    def learn_(self, num_heads: int | None = None) -> FavorAttention:
        """Make the features trained parameters that start from what they are."""
        if not isinstance(self.feature_map, LearnedFeatures):
            self.feature_map = LearnedFeatures(self.feature_map, num_heads=num_heads)
        return self


def end_to_end(x: Tensor) -> Tensor:
    """All rows of ``(B, H, L, D)`` as one row ``(1, H, B L, D)``."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
