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

from typing import NamedTuple

import torch
from torch import Tensor

from performers.features.moments import PairMoments

CALIBRATED = ("optimal", "sderf", "saderf", "data_aware")
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
    """The Gaussian of a calibrated estimator; the standard one for heads without a pair.

    * ``optimal``: FAVOR++ (Likhosherstov et al. 2022), one width, of ``p = E|q + k|^2 / d``.
    * ``sderf``: FAVOR# (Likhosherstov et al. 2023), a width per eigenvector of
      ``E[(q + k)(q + k)^T]``.
    * ``saderf``: symmetric FAVOR# (same source),
      ``M = diag((E k_l^2 / E q_l^2)^{1/4})``, one width.
    * ``data_aware``: the best for the pairs: balanced, centred at ``E[q + k]``, a width per
      direction.
    """
    standard = standard_proposal(*moments.query.shape)
    center, _, balance, inverse = standard
    query_mean, key_mean, query, key, cross = moments.means()
    if estimator == "saderf":
        query_power, key_power = (x.diagonal(dim1=-2, dim2=-1) for x in (query, key))
        floor = _MIN_VARIANCE * (query_power + key_power).mean(-1, keepdim=True) / 2
        ratio = ((key_power + floor) / (query_power + floor)).nan_to_num(0.0).pow(0.25)
        ratio = ratio.where(ratio > 0, 1.0)
        balance, inverse = torch.diag_embed(ratio), torch.diag_embed(1 / ratio)
    elif estimator == "data_aware":
        # Covariances, mixed with those of an isotropic prior.
        share = moments.samples / (moments.samples + query.shape[-1] / 4)
        query_mean, key_mean = (share * x.unsqueeze(-1) for x in (query_mean, key_mean))
        query, key = (
            share * x + (1 - share) * _power(x) * _identity(x) - mean @ mean.mT
            for x, mean in ((query, query_mean), (key, key_mean))
        )
        cross = share * cross - query_mean @ key_mean.mT
        balance = _balance(query, key)
        inverse = torch.linalg.inv(balance)
        center = (balance @ query_mean + inverse @ key_mean).squeeze(-1)
    cross = balance @ cross @ inverse
    total = balance @ query @ balance + inverse @ key @ inverse + (cross + cross.mT)
    if estimator in ("optimal", "saderf"):
        transform = _variances(_power(total)).sqrt() * _identity(total)
    else:
        values, vectors = torch.linalg.eigh((total + total.mT) / 2)
        transform = vectors * _variances(values).sqrt().unsqueeze(-2)
    fits = moments.weight > 0
    return Proposal(
        *(
            new.where(fits.view(-1, *[1] * (new.ndim - 1)), old)
            for new, old in zip((center, transform, balance, inverse), standard, strict=True)
        )
    )


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
    precision = 2 * _identity(total) - torch.linalg.inv(transform @ transform.mT)
    solved = torch.linalg.solve(precision, rest.mT).mT
    constant = torch.linalg.slogdet(transform)[1] - torch.linalg.slogdet(precision)[1] / 2
    return 2 * (rest * solved).sum(-1) - rest.square().sum(-1) + constant.unsqueeze(-1)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _power(second: Tensor) -> Tensor:
    """Mean of the diagonal, shape ``(heads, 1, 1)``."""
    return second.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


def _variances(power: Tensor) -> Tensor:
    """``1 - 4 A(p)``, the best variance of ``w`` in a direction where ``q + k`` has power ``p``."""
    power = power.clamp_min(0.0)
    return 1 - (1 - 2 * power - ((2 * power + 1).square() + 8 * power).sqrt()) / 4


def _balance(query: Tensor, key: Tensor) -> Tensor:
    """Symmetric ``M`` with ``M C_q M = M^{-1} C_k M^{-1}``: the root of a geometric mean."""
    power = _power(query + key) / 2
    # Without any variance both become the identity.
    floor = (_MIN_VARIANCE * power).where(power > 0, 1.0) * _identity(query)
    query, key = query + floor, key + floor
    root = _matrix_sqrt(query)
    inverse = torch.linalg.inv(root)
    return _matrix_sqrt(inverse @ _matrix_sqrt(root @ key @ root) @ inverse)


def _matrix_sqrt(matrix: Tensor) -> Tensor:
    """The symmetric square root of a symmetric, positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT
