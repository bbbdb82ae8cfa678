"""Approximations calibrated on one set of samples, which share their fits."""

import contextlib
from dataclasses import replace

import torch

from performers.attention import ListedKeys
from performers.features import SoftmaxFeatures
from performers.features.softmax import Estimator
from performers.nn import Approximation, FavorAttention
from performers.planning.samples import Samples


class Fits:
    """Attention modules calibrated on samples.

    A fit depends on the estimator, the heads, the window and the sinks, neither on the number of
    features nor on their projection; lists of keys depend on the heads and their length.

    Args:
        samples: Samples to calibrate on.
        seed: Draw ``i`` of every approximation is seeded with ``seed + i``.
    """

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self._seed = seed
        self._features: dict[tuple[Approximation, int], SoftmaxFeatures] = {}
        self._lists: dict[tuple[int, int], ListedKeys] = {}

    def attention(
        self, approximation: Approximation, num_heads: int, draw: int = 0
    ) -> FavorAttention:
        """The calibrated attention with its ``draw``-th projection."""
        favor = self._build(replace(approximation, listed_keys=0), num_heads, self._seed + draw)
        if approximation.is_calibrated:
            assert isinstance(favor.feature_map, SoftmaxFeatures)
            fit = self.features(
                approximation.estimator, num_heads, approximation.window, approximation.sinks
            )
            if fit.is_calibrated:
                favor.feature_map.adopt_calibration_(fit)
            else:
                # All pairs are exact, and leave nothing to fit.
                plain = replace(approximation, listed_keys=0, estimator="positive")
                favor = self._build(plain, num_heads, self._seed + draw)
        if approximation.listed_keys:
            key = num_heads, approximation.listed_keys
            if key not in self._lists:
                lists = self._build(approximation, num_heads, self._seed).buckets
                assert lists is not None
                self._lists[key] = lists.calibrate_(self.samples.query)
            favor.buckets = self._lists[key]
        return favor

    def features(
        self, estimator: Estimator, num_heads: int, window: int | None = None, sinks: int = 0
    ) -> SoftmaxFeatures:
        """One calibrated feature, whose variance has a closed form."""
        key = Approximation(1, estimator, window=window, sinks=sinks), num_heads
        if key not in self._features:
            favor = self._build(*key, seed=0)
            # One sequence at a time: the memory of a fit does not grow with their number.
            for row in range(self.samples.query.shape[0]):
                one = self.samples.part(slice(row, row + 1))
                # Where all pairs are exact there is nothing to fit.
                with contextlib.suppress(ValueError):
                    favor.calibrate_(
                        one.query, one.key, one.key_mask, one.scale, is_causal=one.is_causal
                    )
            assert isinstance(favor.feature_map, SoftmaxFeatures)
            self._features[key] = favor.feature_map
        return self._features[key]

    def _build(self, approximation: Approximation, num_heads: int, seed: int) -> FavorAttention:
        favor = approximation.build(
            self.samples.query.shape[3],
            num_heads,
            generator=torch.Generator().manual_seed(seed),
        )
        return favor.to(self.samples.query.device)
