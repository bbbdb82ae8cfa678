"""Feature maps and key lists fitted to a layer's queries and keys, as attention functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from performers import SoftmaxFeatures, favor_attention
from performers.attention import ListedKeys
from performers.features import CALIBRATED

if TYPE_CHECKING:
    from performers.benchmark.accuracy_variants import Variant
    from performers.benchmark.heads import HeadSample

NUM_BUCKETS = 16
"""Lists of keys per head, of which each query uses one."""


def adopt_fit(feature_map: SoftmaxFeatures, fitted: SoftmaxFeatures) -> None:
    """Give a map the calibration of another of its estimator; its rows stay.

    Args:
        feature_map: The map to change.
        fitted: The other, which may have another projection and number of features.
    """
    fit = {name: x for name, x in fitted.state_dict().items() if name != "weight"}
    feature_map.load_state_dict({**feature_map.state_dict(), **fit})


class LayerFits:
    """Everything that is fitted to one layer, each estimator once for each set of exact pairs.

    Every query head has features and key lists of its own.

    Args:
        calibration: What the layer receives on passages set aside for fitting.
        seed: Of projections and key lists.
    """

    def __init__(self, calibration: HeadSample, seed: int) -> None:
        self._sample = calibration
        self._seed = seed
        self._fitted: dict[tuple[object, ...], SoftmaxFeatures] = {}
        self._buckets: dict[int, ListedKeys] = {}

    def attention(self, variant: Variant, backend: str | None) -> Callable[..., Tensor]:
        """A variant as a function with the call of ``replacement.exact_attention``.

        Args:
            variant: Which.
            backend: Of ``favor_attention``.

        Returns:
            The function; the layer's index, its first argument, is not used.
        """
        listed_keys = self._key_buckets(variant.keys) if variant.keys else None
        if variant.estimator is None:
            return _only_exact(variant.window, variant.sinks, listed_keys)
        features = self._features(variant)

        def attend(
            layer: int,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *,
            scale: float,
            is_causal: bool,
            key_mask: Tensor | None,
        ) -> Tensor:
            return favor_attention(
                query,
                key,
                value,
                features,
                scale=scale,
                is_causal=is_causal,
                key_mask=key_mask,
                window=variant.window,
                sinks=variant.sinks,
                listed_keys=listed_keys,
                backend=backend,
            )

        return attend

    def _features(self, variant: Variant) -> SoftmaxFeatures:
        sample = self._sample
        assert variant.estimator is not None
        features = SoftmaxFeatures(
            sample.query.shape[-1],
            variant.num_features,
            estimator=variant.estimator,
            projection=variant.projection,
            num_heads=sample.query.shape[1],
            generator=self._generator(),
        )
        if variant.estimator not in CALIBRATED:
            return features
        exact = (variant.estimator, variant.window, variant.sinks)
        if exact in self._fitted:
            adopt_fit(features, self._fitted[exact])
            return features
        # One sequence at a time: what fitting holds does not grow with their number.
        for row in range(sample.query.shape[0]):
            part = slice(row, row + 1)
            features.calibrate_(
                sample.query[part],
                sample.key[part],
                None if sample.key_mask is None else sample.key_mask[part],
                sample.scale,
                is_causal=sample.is_causal,
                window=variant.window,
                sinks=variant.sinks,
            )
        self._fitted[exact] = features
        return features

    def _key_buckets(self, keys: int) -> ListedKeys:
        if keys not in self._buckets:
            _, heads, _, head_dim = self._sample.query.shape
            listed_keys = ListedKeys(
                head_dim, NUM_BUCKETS, keys, num_heads=heads, generator=self._generator()
            )
            self._buckets[keys] = listed_keys.calibrate_(self._sample.query)
        return self._buckets[keys]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)


def _only_exact(
    window: int | None, sinks: int, listed_keys: ListedKeys | None
) -> Callable[..., Tensor]:
    """Softmax over the exact terms alone; quadratic, for its error and not its time."""

    def attend(
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        is_causal: bool,
        key_mask: Tensor | None,
    ) -> Tensor:
        place = torch.arange(query.shape[2], device=query.device)
        gap = place[:, None] - place
        mask = (place < sinks) | (True if window is None else gap.abs() <= window)
        if listed_keys is not None:
            mask = mask | _listed(listed_keys, query, key, key_mask, is_causal)
        if is_causal:
            mask = mask & (gap >= 0)
        mask = mask.expand(*mask.shape[:-2], *gap.shape)
        if key_mask is not None:
            mask = mask & key_mask[:, None, None, :]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )

    return attend


def _listed(
    listed_keys: ListedKeys, query: Tensor, key: Tensor, key_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Which keys are listed for which query, shape ``(B, H, L, S)``."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    lists = listed_keys.lists(query.unsqueeze(2), key, key_mask, is_causal=is_causal)
    counts = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.uint8, device=query.device)
    for keys, taken, of_query in zip(*lists, strict=True):
        own = of_query[:, :, 0, :, None].expand(-1, -1, -1, keys.shape[-1])
        counts.scatter_add_(-1, keys.gather(2, own), taken.gather(2, own).to(torch.uint8))
    return counts > 0
