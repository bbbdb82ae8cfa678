"""From options to a feature map and listed keys: fitted once, drawn often."""

import torch

from performers.attention import ListedKeys
from performers.features import SoftmaxFeatures
from performers.features.softmax import CALIBRATED, Estimator
from performers.planning.samples import Samples
from performers.planning.settings import Options

# Of the default ListedKeys.
NUM_BUCKETS = 16


def projected_heads(options: Options, samples: Samples) -> int:
    """How many projections there are."""
    return (samples.key if options.heads == "key" else samples.query).shape[1]


def fit_features(options: Options, samples: Samples, seed: int) -> SoftmaxFeatures:
    """A feature map for the options, calibrated on all of the samples."""
    heads = projected_heads(options, samples)
    features = _draw(options, samples, options.num_features, heads, seed)
    _calibrate(features, samples, options.window, options.sinks)
    return features


def fit_buckets(options: Options, samples: Samples, seed: int) -> ListedKeys | None:
    """The lists of keys for the options, fitted to all queries; None without."""
    if not options.key_list:
        return None
    listed_keys = ListedKeys(
        samples.query.shape[3],
        NUM_BUCKETS,
        options.key_list,
        num_heads=projected_heads(options, samples),
        generator=torch.Generator().manual_seed(seed),
    )
    return listed_keys.to(samples.query.device).calibrate_(samples.query)


def fit_single(
    estimator: Estimator, heads: int, samples: Samples, window: int | None, sinks: int
) -> SoftmaxFeatures:
    """One feature, calibrated: what the closed form of the variance needs."""
    features = SoftmaxFeatures(
        samples.query.shape[3],
        1,
        estimator=estimator,
        num_heads=heads,
        generator=torch.Generator().manual_seed(0),
    ).to(samples.query.device)
    _calibrate(features, samples, window, sinks)
    return features


class Workshop:
    """Feature maps for many settings: what two have in common is fitted once.

    A fit depends on the estimator, the heads and what is exact, neither on the number of features
    nor on how they are drawn; lists depend on the heads and their length.

    Args:
        samples: What to calibrate on.
        seed: Draw ``i`` of every setting is seeded with ``seed + i``.
    """

    def __init__(self, samples: Samples, seed: int) -> None:
        self._samples = samples
        self._seed = seed
        self._fits: dict[tuple[object, ...], SoftmaxFeatures] = {}
        self._buckets: dict[tuple[object, ...], ListedKeys | None] = {}

    def features(self, options: Options, draw: int) -> SoftmaxFeatures:
        """The feature map of a setting with its ``draw``-th projection."""
        heads = projected_heads(options, self._samples)
        seed = self._seed + draw
        features = _draw(options, self._samples, options.num_features, heads, seed)
        if options.estimator not in CALIBRATED:
            return features
        fit = self.fit(options.estimator, heads, options.window, options.sinks)
        features.load_state_dict({**fit.state_dict(), "weight": features.state_dict()["weight"]})
        return features

    def fit(
        self, estimator: Estimator, heads: int, window: int | None, sinks: int
    ) -> SoftmaxFeatures:
        """A calibrated map with one feature."""
        known = (estimator, heads, window, sinks)
        if known not in self._fits:
            self._fits[known] = fit_single(estimator, heads, self._samples, window, sinks)
        return self._fits[known]

    def buckets(self, options: Options) -> ListedKeys | None:
        """The lists of keys of a setting."""
        known = (options.heads, options.key_list)
        if known not in self._buckets:
            self._buckets[known] = fit_buckets(options, self._samples, self._seed)
        return self._buckets[known]


def _draw(
    options: Options, samples: Samples, num_features: int, heads: int, seed: int
) -> SoftmaxFeatures:
    return SoftmaxFeatures(
        samples.query.shape[3],
        num_features,
        estimator=options.estimator,
        projection=options.projection,
        num_heads=heads,
        generator=torch.Generator().manual_seed(seed),
    ).to(samples.query.device)


def _calibrate(features: SoftmaxFeatures, samples: Samples, window: int | None, sinks: int) -> None:
    try:
        features.calibrate_(
            samples.query,
            samples.key,
            samples.key_mask,
            samples.scale,
            is_causal=samples.is_causal,
            window=window,
            sinks=sinks,
        )
    except ValueError:
        # The samples were checked: all pairs are exact, or no attention is left to the others.
        # There is nothing to fit then, and features as they were drawn do.
        features.reset_calibration_()
