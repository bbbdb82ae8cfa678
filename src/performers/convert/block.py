"""The linear attention that a converted attention module carries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from performers.attention import FavorState, ListedKeys, favor_attention, favor_attention_weights
from performers.features import FeatureMap, LearnedFeatures

__all__ = ["BLOCK", "FavorBlock", "boundaries"]

# The name of the submodule in an attention module; None there marks a layer that stays exact.
BLOCK = "favor"


class FavorBlock(nn.Module):
    """Features and exact terms of one attention layer, a submodule of the model's own module.

    Saved, loaded and moved with the model; `performers.redraw_features_` finds the features.

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
        super().__init__()
        self.feature_map = feature_map
        self.window, self.sinks = window, sinks
        self.buckets = listed_keys

    def extra_repr(self) -> str:
        """The exact terms."""
        return f"window={self.window}, sinks={self.sinks}"

    def learn_(self, num_heads: int) -> None:
        """Make the features trained parameters that start from what they are.

        Args:
            num_heads: Heads of the keys.
        """
        if not isinstance(self.feature_map, LearnedFeatures):
            self.feature_map = LearnedFeatures(self.feature_map, num_heads=num_heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool,
        key_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        scale: float | None = None,
        state: FavorState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, FavorState | None]:
        """Attend.

        Args:
            query: (B, H, L, D).
            key: (B, Hkv, L, D).
            value: (B, Hkv, L, Dv).
            is_causal: A query sees itself and what precedes it.
            key_mask: (B, L) bool, True where a key takes part.
            sequence_ids: (B, L); tokens with different ids do not see each other.
            scale: Factor of the scores.
            state: The past.
            return_state: Also return the state after these tokens.

        Returns:
            (B, H, L, Dv), and the state or None.
        """
        if sequence_ids is not None:
            return self._packed(query, key, value, is_causal, key_mask, sequence_ids, scale), None
        options: dict[str, Any] = {
            "is_causal": is_causal,
            "key_mask": key_mask,
            "scale": scale,
            "window": self.window,
            "sinks": self.sinks,
            "listed_keys": self.buckets,
            "state": state,
        }
        if not return_state:
            return favor_attention(query, key, value, self.feature_map, **options), None
        return favor_attention(query, key, value, self.feature_map, return_state=True, **options)

    def weights(
        self,
        query: Tensor,
        key: Tensor,
        *,
        is_causal: bool,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The matrix (B, H, L, S) that `forward` implies; quadratic.

        Args:
            query: (B, H, L, D).
            key: (B, Hkv, S, D).
            is_causal: A query sees itself and what precedes it.
            key_mask: (B, S) bool, True where a key takes part.
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

    def _packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        key_mask: Tensor | None,
        sequence_ids: Tensor,
        scale: float | None,
    ) -> Tensor:
        """All rows laid end to end, with a boundary wherever a sequence or a row begins."""
        if self.buckets is not None:
            raise ValueError(
                "a model converted with key_list takes no packed sequences (position_ids that "
                "begin again): its lists are made from one whole sequence; pass a padded batch "
                "with an attention_mask"
            )
        batch, length = query.shape[0], query.shape[2]
        query, key, value = (
            x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (query, key, value)
        )
        out = favor_attention(
            query,
            key,
            value,
            self.feature_map,
            is_causal=is_causal,
            key_mask=None if key_mask is None else key_mask.reshape(1, -1),
            cu_seqlens=boundaries(sequence_ids),
            scale=scale,
            window=self.window,
            sinks=self.sinks,
        )
        return out.squeeze(0).unflatten(1, (batch, length)).transpose(0, 1)


def boundaries(sequence_ids: Tensor) -> Tensor:
    """Where sequences begin when all rows are laid end to end.

    Args:
        sequence_ids: (B, L); a sequence is a run of one id in a row.

    Returns:
        int32, one more than there are sequences: the beginnings and ``B * L``.
    """
    begins = torch.ones_like(sequence_ids, dtype=torch.bool)
    begins[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    starts = begins.flatten().nonzero().squeeze(-1)
    return torch.cat((starts, starts.new_full((1,), sequence_ids.numel()))).to(torch.int32)
