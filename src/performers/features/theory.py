"""Variance of the kernel estimates in closed form."""

import math

import torch
from torch import Tensor

from performers.features.base import FeatureMap
from performers.features.proposal import CALIBRATED, Proposal, log_second_moment
from performers.features.softmax import SoftmaxFeatures


def log_relative_variance(
    feature_map: FeatureMap, query: Tensor, key: Tensor, scale: float | None = None
) -> Tensor:
    """``log(Var[estimate] / SM^2)`` of ``feature_map.estimate_kernel``, for pairs.

    With ``SM = exp(q . k)``, ``z = q + k`` and ``m = num_features``, for independent rows
    (``projection="gaussian"``; coupled rows have less):

    * positive: ``log((e^{|z|^2} - 1) / m)``
    * hyperbolic: ``log((e^{|z|^2} - 1) (1 - e^{-|z|^2}) / m)``
    * trigonometric: ``log(4 sinh^2(|q-k|^2 / 2) / m)``
    * the calibrated ones: ``log((e^S - 1) / m)``, ``S`` the ``log_second_moment`` of
      ``features/proposal.py`` at the pair's transformed vectors.

    The logarithm does not overflow. Source: Choromanski et al. 2021 (arXiv 2009.14794), Lemma 2.

    Args:
        feature_map: Softmax features, not regularized, with their present calibration. The rows
            that were drawn do not matter, only their distribution.
        query: Not scaled, shape ``(..., pairs, head_dim)``, or ``(..., num_heads, pairs,
            head_dim)`` for a map with a fit per head.
        key: The same shape.
        scale: As in ``estimate_kernel``.

    Returns:
        Shape ``(..., pairs)`` or ``(..., num_heads, pairs)``, float64; ``-inf`` where the
        estimate is exact.

    Raises:
        ValueError: ``feature_map`` is of another kind, or a shape does not fit.
    """
    if not isinstance(feature_map, SoftmaxFeatures) or feature_map.regularized:
        raise ValueError(
            "feature_map must be SoftmaxFeatures with regularized=False, whose variance has a "
            f"closed form, got {feature_map}"
        )
    form = feature_map.form().to(torch.float64)
    query = feature_map._scaled(form, query.double(), "query", scale, is_query=True)
    key = feature_map._scaled(form, key.double(), "key", scale, is_query=False)
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"key must have as many vectors as query ({query.shape[-2]}), one for each pair, got "
            f"{tuple(key.shape)}"
        )
    if feature_map.estimator == "trigonometric":
        gap = (query - key).square().sum(-1)
        log_relative = gap + 2 * (-torch.expm1(-gap)).log()
    elif feature_map.estimator in CALIBRATED:
        total, shared = query + key, feature_map.num_heads is None
        proposal = Proposal(*(feature_map.get_buffer(name) for name in Proposal._fields))
        second = log_second_moment(total.unsqueeze(-3) if shared else total, proposal)
        log_relative = _log_expm1(second.squeeze(-2) if shared else second)
    else:
        norm = (query + key).square().sum(-1)
        log_relative = _log_expm1(norm)
        if feature_map.estimator == "hyperbolic":
            log_relative = log_relative + (-torch.expm1(-norm)).log()
    return log_relative - math.log(feature_map.num_features)


def _log_expm1(x: Tensor) -> Tensor:
    """``log(e^x - 1)`` for ``x >= 0``, up to rounding below."""
    return x + (-torch.expm1(-x.clamp_min(0))).log()
