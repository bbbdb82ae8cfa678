"""Attention in linear time: random features, Performer modules and models."""

from performers.attention import (
    FavorState,
    backends,
    favor_attention,
    favor_attention_weights,
    use_backend,
)
from performers.features import GeneralizedFeatures, SoftmaxFeatures, redraw_features_
from performers.nn import PerformerAttention

__all__ = [
    "FavorState",
    "GeneralizedFeatures",
    "PerformerAttention",
    "SoftmaxFeatures",
    "backends",
    "favor_attention",
    "favor_attention_weights",
    "redraw_features_",
    "use_backend",
]
