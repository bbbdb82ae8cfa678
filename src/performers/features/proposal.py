"""Gaussian proposals: distributions of ``w`` that lower the variance of the kernel estimate.

    exp(q . k) = E_{w ~ N(0, I)} [exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2)]

is an integral over ``w``, and ``w`` may be drawn from any density ``p`` if the integrand is
divided by ``p(w) / N(w; 0, I)``. With ``p = N(c, T T^T)`` rows are ``w = c + T e``,
``e ~ N(0, I)``, and half of the correction goes to the bias of each side:

    phi(x) = exp(w . x + b - |x|^2 / 2),   b = (|e|^2 - |w|^2) / 4 + log |det T| / 2.

The estimate is unbiased for every ``c`` and invertible ``T``. FAVOR+ (``c = 0``, ``T = I``),
FAVOR++ (``c = 0``, ``T = t I``) and FAVOR# (``c = 0``, any ``T``) are special cases.

**Variance.** With ``P = 2 I - (T T^T)^{-1}`` and ``r = q + k - c``, one row has

    E[estimate^2] / exp(2 q . k) = exp(2 r^T P^{-1} r - |r|^2 - log det P / 2 + log |det T|).

The logarithm is quadratic in ``r``. Its mean over pairs is least for ``c = E[q + k]``, whatever
``T``, and then for ``T`` that has the eigenvectors of ``Cov(q + k)`` and, for its eigenvalue
``l``, ``t^2 = 1 - 4 A(l)`` with ``A(l) = (1 - 2 l - sqrt((2 l + 1)^2 + 8 l)) / 16``, the optimum of
Likhosherstov et al. 2022 (arXiv 2205.15317) and 2023 (arXiv 2302.00787), which keep ``c = 0``.
Means of queries and keys then add no variance, and neither does a vector added to all keys, to
which softmax is invariant.

A covariance of few samples is noisy: moments are mixed with those of an isotropic distribution of
the same power, with the weight of ``d / 4`` samples.

**Balance.** ``q . k = (M q) . (M^{-T} k)`` for every invertible ``M``: one that gives both sides
the same covariance makes ``Cov(q + k)`` least.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from performers.features.moments import PairMoments

# Least variance of a direction, relative to the mean over directions.
_MIN_VARIANCE = 1e-3


class Proposal(NamedTuple):
    """A Gaussian per head, and the matrices that balance queries and keys.

    Attributes:
        center: ``c``, shape ``(heads, d)``.
        transform: ``T``, shape ``(heads, d, d)``.
        query_transform: ``M``, shape ``(heads, d, d)``.
        key_transform: ``M^{-T}``, shape ``(heads, d, d)``.
    """

    center: Tensor
    transform: Tensor
    query_transform: Tensor
    key_transform: Tensor


def standard_proposal(heads: int, head_dim: int) -> Proposal:
    """``N(0, I)`` and no balance: FAVOR+."""
    identity = torch.eye(head_dim, dtype=torch.float64, device="cpu").expand(heads, -1, -1)
    return Proposal(identity.new_zeros(heads, head_dim), identity, identity, identity)


def fit_proposal(estimator: str, moments: PairMoments) -> Proposal:
    """The Gaussian of a calibrated estimator; the standard one for heads without a pair."""
    fitted, standard = FITS[estimator](moments), standard_proposal(*moments.query.shape)
    fits = moments.weight > 0
    return Proposal(
        *(
            new.where(fits.view(-1, *[1] * (new.ndim - 1)), old)
            for new, old in zip(fitted, standard, strict=True)
        )
    )


def _fit_optimal(moments: PairMoments) -> Proposal:
    """FAVOR++ (Likhosherstov et al. 2022): one width for all directions, ``p = E|q + k|^2 / d``."""
    transform = _isotropic(_sum_moment(*moments.second_moments()))
    return standard_proposal(*moments.query.shape)._replace(transform=transform)


def _fit_sderf(moments: PairMoments) -> Proposal:
    """FAVOR# (Likhosherstov et al. 2023): a width per eigenvector of ``E[(q + k)(q + k)^T]``."""
    transform = _anisotropic(_sum_moment(*moments.second_moments()))
    return standard_proposal(*moments.query.shape)._replace(transform=transform)


def _fit_saderf(moments: PairMoments) -> Proposal:
    """Symmetric FAVOR# (same source): ``(E k_l^2 / E q_l^2)^{1/4}`` per coordinate, one width."""
    query, key, cross = moments.second_moments()
    query_power, key_power = (x.diagonal(dim1=-2, dim2=-1) for x in (query, key))
    floor = _MIN_VARIANCE * (query_power + key_power).mean(-1, keepdim=True) / 2
    ratio = ((key_power + floor) / (query_power + floor)).nan_to_num(0.0).pow(0.25)
    ratio = ratio.where(ratio > 0, 1.0)
    balance, inverse = torch.diag_embed(ratio), torch.diag_embed(1 / ratio)
    total = _sum_moment(balance @ query @ balance, inverse @ key @ inverse, cross)
    return Proposal(torch.zeros_like(ratio), _isotropic(total), balance, inverse)


def _fit_data_aware(moments: PairMoments) -> Proposal:
    """The best Gaussian for the pairs: balanced, centred at ``E[q + k]``, a width per direction."""
    (query, key, cross), (query_mean, key_mean) = _regularized(moments)
    balance = _balance(query, key)
    inverse = torch.linalg.inv(balance)
    center = (balance @ query_mean.unsqueeze(-1) + inverse @ key_mean.unsqueeze(-1)).squeeze(-1)
    total = _sum_moment(
        balance @ query @ balance, inverse @ key @ inverse, balance @ cross @ inverse
    )
    return Proposal(center, _anisotropic(total), balance, inverse)


FITS: dict[str, Callable[[PairMoments], Proposal]] = {
    "optimal": _fit_optimal,
    "sderf": _fit_sderf,
    "saderf": _fit_saderf,
    "data_aware": _fit_data_aware,
}


def proposed_rows(
    draws: Tensor, center: Tensor, transform: Tensor, log_volume: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows ``w = c + T e``, shape ``(heads, rows, d)``, and their bias ``b``, ``(heads, rows)``.

    ``draws`` are the ``e``, and ``log_volume`` is ``log |det T|``, shape ``(heads,)``.
    """
    rows = draws @ transform.mT + center.unsqueeze(-2)
    norms = draws.square().sum(-1) - rows.square().sum(-1)
    return rows, norms / 4 + log_volume.unsqueeze(-1) / 2


def log_second_moment(total: Tensor, proposal: Proposal) -> Tensor:
    """``log E[estimate^2] - 2 q . k`` of one row, shape ``(..., heads, pairs)``.

    ``total`` is ``q + k`` after the proposal's transforms, shape ``(..., heads, pairs, d)``.
    """
    transform = proposal.transform.to(total.dtype)
    rest = total - proposal.center.to(total.dtype).unsqueeze(-2)
    identity = torch.eye(total.shape[-1], dtype=total.dtype, device=total.device)
    precision = 2 * identity - torch.linalg.inv(transform @ transform.mT)
    solved = torch.linalg.solve(precision, rest.mT).mT
    constant = torch.linalg.slogdet(transform)[1] - torch.linalg.slogdet(precision)[1] / 2
    return 2 * (rest * solved).sum(-1) - rest.square().sum(-1) + constant.unsqueeze(-1)


def _regularized(
    moments: PairMoments,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Covariances ``C_q``, ``C_k``, ``C_qk``, and means, mixed with an isotropic prior."""
    query, key, cross = moments.second_moments()
    query_mean, key_mean = moments.means()
    head_dim = query.shape[-1]
    share = moments.samples / (moments.samples + head_dim / 4)
    query_mean, key_mean = share * query_mean, share * key_mean
    identity = torch.eye(head_dim, dtype=query.dtype, device=query.device)

    def covariance(second: Tensor, left: Tensor, right: Tensor, prior: Tensor | float) -> Tensor:
        return share * second + (1 - share) * prior - left.unsqueeze(-1) * right.unsqueeze(-2)

    return (
        covariance(query, query_mean, query_mean, _power(query)[:, None, None] * identity),
        covariance(key, key_mean, key_mean, _power(key)[:, None, None] * identity),
        covariance(cross, query_mean, key_mean, 0.0),
    ), (query_mean, key_mean)


def _sum_moment(query: Tensor, key: Tensor, cross: Tensor) -> Tensor:
    """``E[(q + k)(q + k)^T]``."""
    return query + key + (cross + cross.mT)


def _power(second: Tensor) -> Tensor:
    """Mean of the diagonal."""
    return second.diagonal(dim1=-2, dim2=-1).mean(-1)


def _variances(power: Tensor) -> Tensor:
    """``1 - 4 A(p)``, the best variance of ``w`` in a direction where ``q + k`` has power ``p``."""
    power = power.clamp_min(0.0)
    return 1 - (1 - 2 * power - ((2 * power + 1).square() + 8 * power).sqrt()) / 4


def _isotropic(second: Tensor) -> Tensor:
    """``T = t I``."""
    identity = torch.eye(second.shape[-1], dtype=second.dtype, device=second.device)
    return _variances(_power(second)).sqrt()[:, None, None] * identity


def _anisotropic(second: Tensor) -> Tensor:
    """``T = U diag(t)`` on the eigenvectors ``U``."""
    values, vectors = torch.linalg.eigh((second + second.mT) / 2)
    return vectors * _variances(values).sqrt().unsqueeze(-2)


def _balance(query: Tensor, key: Tensor) -> Tensor:
    """Symmetric ``M`` with ``M C_q M = M^{-1} C_k M^{-1}``: the root of a geometric mean."""
    power = _power(query + key)[:, None, None] / 2
    identity = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
    # Without any variance both become the identity.
    floor = (_MIN_VARIANCE * power).where(power > 0, 1.0) * identity
    query, key = query + floor, key + floor
    root = _matrix_sqrt(query)
    inverse = torch.linalg.inv(root)
    return _matrix_sqrt(inverse @ _matrix_sqrt(root @ key @ root) @ inverse)


def _matrix_sqrt(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric, positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
