"""Errors of the estimators in closed form, derived apart from the package."""

import math
from functools import cache

import torch


def kernel_variance(query, key, num_features, *, estimator="positive"):
    """Variance of the kernel estimate for scaled pairs and independent rows.

    Every product of exponentials has a Gaussian moment, ``E[exp(w . z)] = exp(|z|^2 / 2)``.
    """
    norms = query.square().sum(-1) + key.square().sum(-1)
    total, gap = ((query + sign * key).square().sum(-1) for sign in (1, -1))
    mean = (query * key).sum(-1).exp()
    if estimator == "positive":
        return ((2 * total - norms).exp() - mean.square()) / num_features
    if estimator == "hyperbolic":
        # cosh(w . z)^2 = (1 + cosh(2 w . z)) / 2
        square = (1 + (2 * total).exp()) / 2 * (-norms).exp()
    else:
        # cos(w . (q - k))^2 = (1 + cos(2 w . (q - k))) / 2, E[cos(w . x)] = e^{-|x|^2 / 2}
        square = (1 + (-2 * gap).exp()) / 2 * norms.exp()
    return (square - mean.square()) / (num_features / 2)


@cache
def pair_mean(cosine, head_dim, sum_norm):
    """``E exp((w_i + w_j) . z)`` of rows at one cosine with independent chi lengths ``a, b``.

    ``sum_k (u / 2)^k / k! * E (a^2 + b^2 + 2 cosine a b)^k / (d (d + 2) ... (d + 2 k - 2))``,
    ``u = |z|^2``, every power multiplied out.
    """

    def chi(power):
        return 2 ** (power / 2) * math.gamma((head_dim + power) / 2) / math.gamma(head_dim / 2)

    total = 0.0
    for k in range(40):
        moment = sum(
            math.comb(k, i)
            * math.comb(k - i, j)
            * (2 * cosine) ** (k - i - j)
            * chi(k + i - j)
            * chi(k - i + j)
            for i in range(k + 1)
            for j in range(k + 1 - i)
        )
        total += (sum_norm / 2) ** k / math.factorial(k) * moment / chi(2 * k)
    return total


def coupled_error(projection, num_rows, head_dim, sum_norm, width=1.0):
    """``MSE * m / SM^2`` of ``m`` positive features with coupled rows ``t e``, ``t`` the width.

    With ``u = |z|^2``, a block of ``r`` rows has ``e^S - 1 + sum_{i != j} (e^{-u} P_ij - 1) / r``,
    ``P_ij = E exp((w_i + w_j) . z)``, and blocks are averaged by their sizes. Independent rows have
    ``S = 2 u / (2 - t^{-2}) - u + d log t - (d / 2) log(2 - t^{-2})``, and opposite ones, which
    share a length, ``P = t^{2 d} (2 t^2 - 1)^{-d / 2}``. Hadamard rows count as orthogonal.
    """
    ratio = 2 - width**-2
    second = 2 * sum_norm / ratio - sum_norm + head_dim * (math.log(width) - math.log(ratio) / 2)
    if projection == "gaussian":
        return math.expm1(second)
    block = 2 * head_dim if projection == "antithetic" else head_dim
    full, rest = divmod(num_rows, block)
    total = 0.0
    for rows, count in ((block, full), (rest, 1)):
        opposite = 2 * (rows // 2) if projection == "antithetic" else 0
        others = rows * (rows - 1) - opposite
        cosine = -1 / max(rows - 1, 1) if projection == "simplex" else 0.0
        coupled = opposite * (width ** (2 * head_dim) * (2 * width**2 - 1) ** (-head_dim / 2))
        if count and others:
            coupled += others * pair_mean(cosine, head_dim, sum_norm)
        total += count * (
            rows * math.expm1(second) + coupled * math.exp(-sum_norm) - rows * (rows - 1)
        )
    return total / num_rows


def smreg_ratio(sum_norm, head_dim):
    """The mean of ``exp(w . z - |z|^2 / 2)`` over rows on the sphere of radius ``sqrt(d)``.

    ``e^{-u / 2} sum_n (d u / 4)^n / (n! (d / 2)_n)``, ``u = |z|^2``.
    """
    logs = [
        n * math.log(head_dim * sum_norm / 4)
        - math.lgamma(n + 1)
        - math.lgamma(head_dim / 2 + n)
        + math.lgamma(head_dim / 2)
        for n in range(2000)
    ]
    return math.fsum(math.exp(x - sum_norm / 2) for x in logs)


def gaussian_expectation(function, epsilon, query, key):
    """``E[(f(w.q) + eps)(f(w.k) + eps)]`` by a midpoint rule over the plane of q and k."""
    nodes = torch.linspace(-8, 8, 801, dtype=torch.float64)[:-1] + 0.01
    mass = (-nodes.square() / 2).exp()
    mass = mass / mass.sum()
    values = []
    for q, k in zip(query, key, strict=True):
        along = (q @ k) / q.norm().clamp_min(1e-300)
        across = (k.square().sum() - along.square()).clamp_min(0).sqrt()
        left = function(q.norm() * nodes) + epsilon
        right = function(along * nodes[:, None] + across * nodes) + epsilon
        values.append(mass @ (left[:, None] * right) @ mass)
    return torch.stack(values)
