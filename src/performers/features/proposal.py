"""Gaussian proposals: where to draw ``w`` so that the estimate of ``exp(q . k)`` varies little.

    exp(q . k) = E_{w ~ N(0, I)} [exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2)]

is an integral over ``w``, and ``w`` may be drawn from any density ``p`` if the integrand is
divided by ``p(w) / N(w; 0, I)``. With ``p = N(c, T T^T)`` rows are ``w = c + T e``,
``e ~ N(0, I)``, and half of the correction goes to the bias of each side:

    phi(x) = exp(w . x + b - |x|^2 / 2),   b = (|e|^2 - |w|^2) / 4 + log |det T| / 2.

That is unbiased for every ``c`` and invertible ``T``, and all of these are such proposals:
FAVOR+ (``c = 0``, ``T = I``), FAVOR++ (``T = t I``), FAVOR# (``c = 0``, any ``T``).

**Variance.** With ``P = 2 I - (T T^T)^{-1}`` and ``r = q + k - c``, one row has

    E[estimate^2] / exp(2 q . k) = exp(2 r^T P^{-1} r - |r|^2 - log det P / 2 + log |det T|).

The logarithm is quadratic in ``r``. Its mean over pairs is least for ``c = E[q + k]``, whatever
``T``, and then for ``T`` that has the eigenvectors of ``Cov(q + k)`` and, for its eigenvalue
``l``, ``t^2 = 1 - 4 A(l)`` with ``A(l) = (1 - 2 l - sqrt((2 l + 1)^2 + 8 l)) / 16``, the optimum of
Likhosherstov et al. 2022 (arXiv 2205.15317) and 2023 (arXiv 2302.00787), which keep ``c = 0``.
A mean of queries or keys then costs nothing, and neither does a vector added to all keys, which
softmax does not see.

With few samples a covariance is mostly chance: moments are mixed with those of an isotropic
distribution of the same power, which counts as much as ``d / 4`` samples.

**Balance.** ``q . k = (M q) . (M^{-T} k)`` for every invertible ``M``: one that gives both sides
the same covariance makes ``Cov(q + k)`` least.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from performers.features.moments import PairMoments

# Directions in which the samples did not vary count as varying this little, of the average.
_LEAST_VARIANCE = 1e-3


class Proposal(NamedTuple):
    """A Gaussian per head, and what to multiply queries and keys with first.

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


def fit_optimal(moments: PairMoments) -> Proposal:
    """FAVOR++ (Likhosherstov et al. 2022): one width for all directions, ``p = E|q + k|^2 / d``."""
    standard = standard_proposal(*moments.query.shape)
    power = _sum_moment(moments).diagonal(dim1=-2, dim2=-1).mean(-1)
    width = _widths(power).sqrt()[:, None, None]
    return _where_known(moments, standard._replace(transform=width * standard.transform))


def fit_sderf(moments: PairMoments) -> Proposal:
    """FAVOR# (Likhosherstov et al. 2023): a width per eigenvector of ``E[(q + k)(q + k)^T]``."""
    standard = standard_proposal(*moments.query.shape)
    return _where_known(moments, standard._replace(transform=_transform(_sum_moment(moments))))


def fit_saderf(moments: PairMoments) -> Proposal:
    """Symmetric FAVOR# (same source): ``(E k_l^2 / E q_l^2)^{1/4}`` per coordinate, one width."""
    query, key, cross = (_finite(x) for x in moments.second_moments())
    query_power, key_power = (x.diagonal(dim1=-2, dim2=-1) for x in (query, key))
    floor = _LEAST_VARIANCE * (query_power + key_power).mean(-1, keepdim=True) / 2
    ratio = _finite((key_power + floor) / (query_power + floor)).pow(0.25)
    ratio = ratio.where(ratio > 0, 1.0)
    balance = torch.diag_embed(ratio)
    inverse = torch.diag_embed(1 / ratio)
    both = balance @ query @ balance + inverse @ key @ inverse + _twice_symmetric(cross)
    power = both.diagonal(dim1=-2, dim2=-1).mean(-1)
    standard = standard_proposal(*moments.query.shape)
    width = _widths(power).sqrt()[:, None, None]
    fitted = Proposal(standard.center, width * standard.transform, balance, inverse)
    return _where_known(moments, fitted)


def fit_data_aware(moments: PairMoments) -> Proposal:
    """The best Gaussian for the pairs: balanced, centred at ``E[q + k]``, a width per direction."""
    (query, key, cross), (query_mean, key_mean) = _regularized(moments)
    balance = _balance(query, key)
    inverse = torch.linalg.inv(balance)
    center = (balance @ query_mean.unsqueeze(-1) + inverse @ key_mean.unsqueeze(-1)).squeeze(-1)
    both = (
        balance @ query @ balance
        + inverse @ key @ inverse
        + _twice_symmetric(balance @ cross @ inverse)
    )
    return _where_known(moments, Proposal(center, _transform(both), balance, inverse))


def log_second_moment(total: Tensor, proposal: Proposal) -> Tensor:
    """``log E[estimate^2] - 2 q . k`` of one row.

    Args:
        total: ``q + k`` after the proposal's transforms, shape ``(..., heads, pairs, d)``.
        proposal: The Gaussian.

    Returns:
        Shape ``(..., heads, pairs)``.
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
    query, key, cross = (_finite(x) for x in moments.second_moments())
    query_mean, key_mean = (_finite(x) for x in moments.means())
    head_dim = query.shape[-1]
    share = moments.samples / (moments.samples + head_dim / 4)
    query_mean, key_mean = share * query_mean, share * key_mean

    def covariance(second: Tensor, left: Tensor, right: Tensor, prior: Tensor) -> Tensor:
        return share * second + (1 - share) * prior - left.unsqueeze(-1) * right.unsqueeze(-2)

    def isotropic(second: Tensor) -> Tensor:
        power = second.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        return power * torch.eye(head_dim, dtype=second.dtype, device=second.device)

    return (
        covariance(query, query_mean, query_mean, isotropic(query)),
        covariance(key, key_mean, key_mean, isotropic(key)),
        covariance(cross, query_mean, key_mean, torch.zeros_like(cross)),
    ), (query_mean, key_mean)


def _sum_moment(moments: PairMoments) -> Tensor:
    query, key, cross = (_finite(x) for x in moments.second_moments())
    return query + key + _twice_symmetric(cross)


def _twice_symmetric(cross: Tensor) -> Tensor:
    return cross + cross.mT


def _widths(power: Tensor) -> Tensor:
    """``1 - 4 A(p)``, the best variance of ``w`` in a direction where ``q + k`` has power ``p``."""
    power = power.clamp_min(0.0)
    return 1 - (1 - 2 * power - ((2 * power + 1).square() + 8 * power).sqrt()) / 4


def _transform(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return vectors * _widths(values).sqrt().unsqueeze(-2)


def _balance(query: Tensor, key: Tensor) -> Tensor:
    """Symmetric ``M`` with ``M C_q M = M^{-1} C_k M^{-1}``: the root of a geometric mean."""
    power = (query + key).diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] / 2
    identity = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
    # Without any variation both become the identity.
    floor = (_LEAST_VARIANCE * power).where(power > 0, 1.0) * identity
    query, key = query + floor, key + floor
    root = _root(query)
    inverse = torch.linalg.inv(root)
    return _root(inverse @ _root(root @ key @ root) @ inverse)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric, positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def _finite(x: Tensor) -> Tensor:
    """Zeros for heads of which no pair was seen."""
    return x.nan_to_num(0.0)


def _where_known(moments: PairMoments, fitted: Proposal) -> Proposal:
    """The fit, and the standard Gaussian for heads of which no pair was seen."""
    known = moments.weight > 0
    standard = standard_proposal(*moments.query.shape)
    return Proposal(
        *(
            new.where(known.view(-1, *[1] * (new.ndim - 1)), old)
            for new, old in zip(fitted, standard, strict=True)
        )
    )
