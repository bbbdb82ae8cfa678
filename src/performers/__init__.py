"""Attention in linear time: random features, Performer modules and models."""

from performers.attention import (
    FavorState,
    KeyBuckets,
    backends,
    favor_attention,
    favor_attention_weights,
    use_backend,
)
from performers.features import (
    GeneralizedFeatures,
    LearnedFeatures,
    SoftmaxFeatures,
    redraw_features_,
)
from performers.nn import PerformerAttention
from performers.planning import plan

__all__ = [
    "FavorState",
    "GeneralizedFeatures",
    "KeyBuckets",
    "LearnedFeatures",
    "PerformerAttention",
    "SoftmaxFeatures",
    "backends",
    "favor_attention",
    "favor_attention_weights",
    "plan",
    "redraw_features_",
    "use_backend",
]
