"""Closed-form errors of the estimators, for tests, plans and plots.

Vectors named ``query`` and ``key`` are already scaled (``x' = sqrt(scale) x``) unless a feature map
is passed along, ``SM = exp(q . k)``, ``z = q + k``, and ``num_features`` counts features as
``SoftmaxFeatures`` does: the two-sided estimators draw half as many rows. Variances are for
independent rows; ``coupled_variance`` is for orthogonal ones and their like. Sources: Choromanski
et al. 2021 (arXiv 2009.14794), Lemma 2 and Theorem 2; ``features/proposal.py`` for the estimators
that are calibrated; Reid et al. 2023 (arXiv 2301.13856) for simplices.
"""

import math

import torch
from torch import Tensor

from performers.features.base import FeatureMap, resolve_scale
from performers.features.coupling_theory import log_pair_mean
from performers.features.projections import PROJECTIONS, Projection
from performers.features.proposal import Proposal, log_second_moment
from performers.features.softmax import CALIBRATED, ESTIMATORS, Estimator, SoftmaxFeatures


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
        estimator: One of these three; the others depend on what they were calibrated on, see
            ``feature_variance``.

    Returns:
        Shape ``(...)``.

    Raises:
        ValueError: ``estimator`` is unknown, or one that is calibrated.
    """
    relative = _log_relative(query, key, num_features, estimator)
    return (relative + 2 * (query * key).sum(-1)).exp()


def log_relative_variance(
    feature_map: FeatureMap, query: Tensor, key: Tensor, scale: float | None = None
) -> Tensor:
    """``log(Var[estimate] / SM^2)`` of ``feature_map.estimate_kernel``, for pairs.

    The logarithm does not overflow however long the vectors are. With ``m = num_features``:

    * positive: ``log((e^{|z|^2} - 1) / m)``
    * hyperbolic: ``log((e^{|z|^2} - 1) (1 - e^{-|z|^2}) / m)``
    * trigonometric: ``log(4 sinh^2(|q-k|^2 / 2) / m)``
    * the calibrated ones: ``log((e^S - 1) / m)``, ``S`` the ``log_second_moment`` of
      ``features/proposal.py`` at the pair's transformed vectors.

    That is for independent rows (``projection="gaussian"``). Coupled rows have less, isotropic
    estimators by the amount in ``coupled_variance``.

    Args:
        feature_map: Softmax features, not regularized, as they are calibrated now. Its rows do
            not matter, only their distribution.
        query: Shape ``(..., pairs, head_dim)``, or ``(..., num_heads, pairs, head_dim)`` for a map
            with a fit per head. Not scaled.
        key: The same shape.
        scale: As in ``estimate_kernel``.

    Returns:
        Shape ``(..., pairs)`` or ``(..., num_heads, pairs)``, float64; ``-inf`` where the
        estimate is exact.

    Raises:
        ValueError: ``feature_map`` is of another kind, or a shape does not fit.
    """
    query, key = _scaled_pairs(feature_map, query, key, scale)
    assert isinstance(feature_map, SoftmaxFeatures)
    if feature_map.estimator not in CALIBRATED:
        return _log_relative(query, key, feature_map.num_features, feature_map.estimator)
    proposal = Proposal(
        feature_map.center.double(),
        feature_map.transform.double(),
        feature_map.query_transform.double(),
        feature_map.key_transform.double(),
    )
    form = feature_map.form().to(torch.float64)
    total = form.transformed(query, is_query=True) + form.transformed(key, is_query=False)
    if feature_map.num_heads is None:
        second = log_second_moment(total.unsqueeze(-3), proposal).squeeze(-2)
    else:
        second = log_second_moment(total, proposal)
    return _log_expm1(second) - math.log(feature_map.num_features)


def feature_variance(
    feature_map: FeatureMap, query: Tensor, key: Tensor, scale: float | None = None
) -> Tensor:
    """``Var[estimate]`` of ``feature_map.estimate_kernel`` for pairs, independent rows.

    ``SM^2 e^{log_relative_variance}``, which has the formulas.

    Args:
        feature_map: As in ``log_relative_variance``.
        query: Shape ``(..., pairs, head_dim)``, or ``(..., num_heads, pairs, head_dim)`` for a map
            with a fit per head. Not scaled.
        key: The same shape.
        scale: As in ``estimate_kernel``.

    Returns:
        Shape ``(..., pairs)`` or ``(..., num_heads, pairs)``, float64.

    Raises:
        ValueError: ``feature_map`` is of another kind, or a shape does not fit.
    """
    relative = log_relative_variance(feature_map, query, key, scale)
    query, key = _scaled_pairs(feature_map, query, key, scale)
    return (relative + 2 * (query * key).sum(-1)).exp()


def coupled_variance(
    query: Tensor,
    key: Tensor,
    num_features: int,
    *,
    projection: Projection = "orthogonal",
    width: float | Tensor = 1.0,
) -> Tensor:
    """Variance of the positive estimate for pairs of scaled vectors, coupled rows.

    With ``u = |z|^2``, a block of ``r`` rows that share a cosine ``g`` has

        Var r / SM^2 = e^S - 1 + (r - 1) (e^{-u} P - 1),   P = E exp((w_i + w_j) . z),

    ``S = u``, and blocks are averaged by their sizes. ``P`` is ``1F1(d; d/2; u/2)`` for orthogonal
    rows, ``g = 0``; ``log_pair_mean`` has it for any ``g``, ``-1 / (r - 1)`` for a simplex. Of
    opposite rows ``P = 1``.

    Rows ``w = t e``, ``t`` the width of an isotropic proposal (``optimal``), have the same ``P``:
    the correction for ``t`` depends on lengths alone, and turns lengths of one distribution into
    those of the other. Only ``S = 2 u / (2 - t^{-2}) - u + d log t - (d / 2) log(2 - t^{-2})``
    changes, and opposite rows, which share a length, have ``P = t^{2 d} (2 t^2 - 1)^{-d / 2}``.

    Args:
        query: Shape ``(..., d)``.
        key: Shape ``(..., d)``.
        num_features: Rows ``m``.
        projection: How rows are coupled. Rows of ``"hadamard"`` are only nearly Haar: for them
            this is the variance of orthogonal ones, from which theirs differs by a few per cent.
        width: ``t``, at least 1: a number or shape ``(...)``.

    Returns:
        Shape ``(...)``, float64.

    Raises:
        ValueError: ``projection`` is unknown, or ``num_features`` or ``width`` is too small.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}")
    query, key = query.double(), key.double()
    head_dim = query.shape[-1]
    norm = (query + key).square().sum(-1)
    square = torch.as_tensor(width, dtype=torch.float64, device=norm.device).square()
    if not bool((square >= 1).all()):
        raise ValueError(f"width must be at least 1, got {width}")
    ratio = 2 - 1 / square
    second = 2 * norm / ratio - norm + head_dim / 2 * (square.log() - ratio.log())
    below = torch.zeros_like(second)
    block = {"gaussian": 1, "antithetic": 2 * head_dim}.get(projection, head_dim)
    full, rest = divmod(num_features, block)
    for rows, count in ((block, full), (rest, 1)):
        if rows > 1 and count:
            below = below + count / num_features * _block_sum(
                norm, square, rows, head_dim, projection
            )
    # e^S - 1 + sum = e^S (1 - e^{-S} + e^{-S} sum): nothing overflows before the end.
    relative = -torch.expm1(-second) + below * (-second).exp()
    log_variance = second + relative.clamp_min(0).log() - math.log(num_features)
    return (log_variance + 2 * (query * key).sum(-1)).exp()


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


def _log_relative(query: Tensor, key: Tensor, num_features: int, estimator: str) -> Tensor:
    if estimator not in ESTIMATORS or estimator in CALIBRATED:
        wanted = tuple(name for name in ESTIMATORS if name not in CALIBRATED)
        raise ValueError(
            f"estimator must be one of {wanted}, got {estimator!r}; feature_variance takes a "
            "calibrated feature map"
        )
    if estimator == "trigonometric":
        gap = (query - key).square().sum(-1)
        relative = gap + 2 * (-torch.expm1(-gap)).log()
    else:
        norm = (query + key).square().sum(-1)
        relative = _log_expm1(norm)
        if estimator == "hyperbolic":
            relative = relative + (-torch.expm1(-norm)).log()
    return relative - math.log(num_features)


def _log_expm1(x: Tensor) -> Tensor:
    """``log(e^x - 1)`` for ``x >= 0``, up to rounding below."""
    return x + (-torch.expm1(-x.clamp_min(0))).log()


def _scaled_pairs(
    feature_map: FeatureMap, query: Tensor, key: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    if not isinstance(feature_map, SoftmaxFeatures) or feature_map.regularized:
        raise ValueError(
            "feature_map must be SoftmaxFeatures with regularized=False, whose variance has a "
            f"closed form, got {feature_map}"
        )
    head_dim, heads = feature_map.head_dim, feature_map.num_heads
    wanted = f"(..., pairs, {head_dim})" if heads is None else f"(..., {heads}, pairs, {head_dim})"
    for name, x in (("query", query), ("key", key)):
        if (
            x.ndim < (2 if heads is None else 3)
            or x.shape[-1] != head_dim
            or heads not in (None, x.shape[-3] if x.ndim > 2 else None)
        ):
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")
    if query.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"key must have as many vectors as query ({query.shape[-2]}), one for each pair, got "
            f"{tuple(key.shape)}"
        )
    root = math.sqrt(resolve_scale(scale, head_dim))
    return query.double() * root, key.double() * root


def _block_sum(norm: Tensor, square: Tensor, rows: int, head_dim: int, projection: str) -> Tensor:
    """``sum_{i != j} (e^{-u} P_ij - 1)`` over one block of rows."""
    cosine = -1 / (rows - 1) if projection == "simplex" else 0.0
    pairs = rows * (rows - 1)
    opposite = 2 * (rows // 2) if projection == "antithetic" else 0
    total = torch.zeros_like(norm)
    if pairs > opposite:
        log_mean = log_pair_mean(norm, head_dim, cosine)
        total = (pairs - opposite) * torch.expm1(log_mean - norm)
    if opposite:
        log_mean = head_dim * (square.log() - (2 * square - 1).log() / 2)
        total = total + opposite * torch.expm1(log_mean - norm)
    return total
