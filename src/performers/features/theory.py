"""Closed-form errors of the estimators, for tests, plans and plots.

Throughout, ``q`` and ``k`` are already scaled (``x' = sqrt(scale) x``), ``SM = exp(q . k)``,
``z = q + k``, and ``num_features`` counts features as ``SoftmaxFeatures`` does: the two-sided
estimators draw half as many rows. Variances are for independent Gaussian rows. Source:
Choromanski et al. 2021 (arXiv 2009.14794), Lemma 2 and Theorem 2.
"""

import torch
from torch import Tensor

from performers.features.softmax import ESTIMATORS, Estimator


def softmax_kernel(query: Tensor, key: Tensor) -> Tensor:
    """``exp(q . k)`` for pairs, shapes ``(..., d)`` and ``(..., d)`` to ``(...)``."""
    return (query * key).sum(-1).exp()


def kernel_variance(
    query: Tensor, key: Tensor, num_features: int, *, estimator: Estimator = "positive"
) -> Tensor:
    """Variance of the kernel estimate for pairs of scaled vectors, independent rows.

    With ``n`` draws (``num_features``, or half of it for the two-sided estimators):

    * positive: ``e^{|z|^2} SM^2 (1 - e^{-|z|^2}) / n``
    * hyperbolic: ``(1 - e^{-|z|^2}) / 2`` times the line above
    * trigonometric: ``e^{|z|^2} SM^{-2} (1 - e^{-|q-k|^2})^2 / (2 n)``

    Args:
        query: Shape ``(..., d)``.
        key: Shape ``(..., d)``.
        num_features: Length of the feature vector.
        estimator: Which one.

    Returns:
        Shape ``(...)``.

    Raises:
        ValueError: ``estimator`` is unknown.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
    kernel = softmax_kernel(query, key)
    sum_norm = (query + key).square().sum(-1)
    if estimator == "trigonometric":
        gap = -torch.expm1(-(query - key).square().sum(-1))
        return sum_norm.exp() * kernel.pow(-2) * gap.square() / num_features
    positive = torch.expm1(sum_norm) * kernel.square()
    if estimator == "positive":
        return positive / num_features
    return positive * -torch.expm1(-sum_norm) / num_features


def orthogonal_gain(query: Tensor, key: Tensor, num_features: int) -> Tensor:
    """Least amount by which orthogonal rows lower the mean squared error of ``positive``.

    ``2 (m - 1) / (m (d + 2)) * (SM - e^{-(|q|^2 + |k|^2) / 2})^2`` for ``m <= d`` rows in one
    block (Theorem 2).

    Args:
        query: Shape ``(..., d)``.
        key: Shape ``(..., d)``.
        num_features: ``m``, at most ``d``.

    Returns:
        Shape ``(...)``.

    Raises:
        ValueError: ``num_features`` exceeds ``d``.
    """
    head_dim = query.shape[-1]
    if num_features > head_dim:
        raise ValueError(
            f"num_features must be at most head_dim ({head_dim}), one block, got {num_features}"
        )
    norms = query.square().sum(-1) + key.square().sum(-1)
    gap = softmax_kernel(query, key) - (-norms / 2).exp()
    return 2 * (num_features - 1) / (num_features * (head_dim + 2)) * gap.square()
