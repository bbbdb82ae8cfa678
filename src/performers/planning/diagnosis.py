"""Statistics of queries and keys that decide whether features suffice.

Averages are over pairs of a query and a key, drawn in two ways: evenly from all pairs, and from
attention (a query, then a key with its softmax probability). The second kind decides the error of
the output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from performers.features.softmax import Estimator
from performers.features.theory import log_relative_variance
from performers.planning.fits import Fits
from performers.planning.samples import Samples

# Features suffice where the relative error of the kernel, over pairs from attention, is below this.
WANTED_KERNEL_ERROR = 0.5
TOP_KEYS = 16
_MAX_QUERIES = 512
_QUERY_BLOCK = 256
_COMPARED: tuple[Estimator, ...] = ("positive", "data_aware")
_PAIRS_PER_QUERY = 8

_Pairs = tuple[Tensor, Tensor]
"""Queries and keys, each ``(Hkv, pairs, D)``, float64, multiplied by ``sqrt(scale)``."""


@dataclass(frozen=True)
class FeatureVariance:
    """``Var[estimate] / exp(2 q . k)`` of one feature with independent rows, closed form.

    Attributes:
        estimator: The estimator, calibrated without exact terms.
        log10_median: ``log10`` of the median over evenly drawn pairs and heads.
        log10_attended: Mean of ``log10`` over pairs drawn from attention and heads.
        log10_features_needed: ``log10`` of the ``m`` at which the relative error of the kernel,
            ``sqrt(10^log10_attended / m)``, is 0.5.
    """

    estimator: str
    log10_median: float
    log10_attended: float
    log10_features_needed: float

    def kernel_error(self, num_features: int) -> float:
        """``sqrt(10^log10_attended / num_features)``, infinity where that is too large."""
        exponent = (self.log10_attended - math.log10(num_features)) / 2
        return 10**exponent if exponent < 300 else math.inf


@dataclass(frozen=True)
class Diagnosis:
    """Queries and keys of the held-out sequences, scaled by ``sqrt(scale)``; means over heads.

    Attributes:
        query_norm: Mean ``|q|^2``.
        key_norm: Mean ``|k|^2``.
        sum_norm: Mean ``|q + k|^2`` over evenly drawn pairs: the logarithm of one feature's
            relative variance in FAVOR+.
        attended_sum_norm: The same over pairs drawn from attention.
        centred_sum_norm: The same over evenly drawn pairs, ``q + k`` less its mean.
        calibrated_sum_norm: The same over pairs drawn from attention, balanced and less the centre
            of ``data_aware``.
        effective_dimension: Participation ratio ``(sum l)^2 / sum l^2`` of the eigenvalues of
            ``Cov(q + k)``, evenly drawn pairs; one where nothing varies.
        variances: Of one ``positive`` and one calibrated ``data_aware`` feature.
        window_shares: Share of attention within each window, by window.
        sink_shares: Share of attention on the first keys, by their number.
        top_share: Share of attention on each query's ``TOP_KEYS`` largest keys.
        features_suffice: Whether features without exact terms are enough.
        sentence: The reason in words.
    """

    query_norm: float
    key_norm: float
    sum_norm: float
    attended_sum_norm: float
    centred_sum_norm: float
    calibrated_sum_norm: float
    effective_dimension: float
    variances: tuple[FeatureVariance, ...]
    window_shares: dict[int, float]
    sink_shares: dict[int, float]
    top_share: float
    features_suffice: bool
    sentence: str


@torch.no_grad()
def diagnose(
    samples: Samples,
    fits: Fits,
    *,
    most_features: int,
    windows: Sequence[int | None],
    sinks: Sequence[int],
    seed: int,
) -> Diagnosis:
    """Diagnose held-out sequences; ``fits`` are those to the others."""
    widths = sorted({window for window in windows if window is not None} or {64})
    if samples.query.shape[2] != samples.key.shape[2]:
        widths = []
    numbers = sorted({number for number in sinks if number} or {4})
    evenly, attended, shares = _draw_pairs(
        samples, widths, numbers, torch.Generator().manual_seed(seed)
    )
    total = evenly[0] + evenly[1]
    centred = total - total.mean(1, keepdim=True)
    spectrum = torch.linalg.eigvalsh(centred.mT @ centred / centred.shape[1]).clamp_min(0)
    square, squares = spectrum.sum(-1).square(), spectrum.square().sum(-1)
    features = [fits.features(name, samples.key.shape[1]) for name in _COMPARED]
    variances = []
    for fit in features:
        # Without the -inf of q + k = 0.
        even_logs, attended_logs = (
            log_relative_variance(fit, *pairs, 1.0).clamp_min(math.log(2**-52))
            for pairs in (evenly, attended)
        )
        log10 = float(attended_logs.mean()) / math.log(10)
        variances.append(
            FeatureVariance(
                fit.estimator,
                float(even_logs.median()) / math.log(10),
                log10,
                log10 - 2 * math.log10(WANTED_KERNEL_ERROR),
            )
        )
    best = min(variances, key=lambda variance: variance.log10_attended)
    suffice = best.kernel_error(most_features) <= WANTED_KERNEL_ERROR
    form = features[1].form().to(torch.float64)
    query = form.transformed(attended[0], is_query=True)
    key = form.transformed(attended[1], is_query=False) - features[1].center.double().unsqueeze(1)
    window_shares = dict(zip(widths, shares[2:], strict=False))
    sink_shares = dict(zip(numbers, shares[2 + len(widths) :], strict=True))
    parts = [f"{share:.0%} is within {window} positions" for window, share in window_shares.items()]
    parts += [f"{share:.0%} on the first {count} keys" for count, share in sink_shares.items()]
    parts.append(f"{shares[1]:.0%} on the {TOP_KEYS} largest keys of each query")
    powers = " and ".join(
        f"e^{x.log10_attended * math.log(10):.1f} ({x.estimator})" for x in variances
    )
    exponent = (best.log10_attended - math.log10(most_features)) / 2
    left = f"{10**exponent:.2g}" if exponent < 3 else f"10^{exponent:.0f}"
    power = max(0.0, best.log10_features_needed)
    needed = f"{math.ceil(10**power):,}" if power < 6 else f"10^{power:.0f}"
    return Diagnosis(
        query_norm=_mean_norm(samples.query, samples.query_mask) * samples.scale,
        key_norm=_mean_norm(samples.key, samples.key_mask) * samples.scale,
        sum_norm=_mean_norm(total),
        attended_sum_norm=_mean_norm(attended[0] + attended[1]),
        centred_sum_norm=_mean_norm(centred),
        calibrated_sum_norm=_mean_norm(query + key),
        effective_dimension=float((square / squares).where(squares > 0, 1.0).mean()),
        variances=tuple(variances),
        window_shares=window_shares,
        sink_shares=sink_shares,
        top_share=shares[1],
        features_suffice=suffice,
        sentence=(
            f"Features alone {'can' if suffice else 'cannot'} do it: where attention is, one "
            f"feature has a relative variance of {powers}, so that {most_features} leave the "
            f"kernel off by {left} times its size (for {WANTED_KERNEL_ERROR} it takes {needed} "
            f"features). Of the attention, {', '.join(parts)}"
            f"{'' if suffice else ': meet such keys exactly'}."
        ),
    )


def _draw_pairs(
    samples: Samples, windows: list[int], sinks: list[int], random: torch.Generator
) -> tuple[_Pairs, _Pairs, list[float]]:
    """Pairs drawn evenly and from attention, and shares of attention.

    The shares are those of all keys, of the ``TOP_KEYS`` largest, of each window and of the sinks.
    """
    size, head_dim = samples.key.shape[2:]
    device = samples.key.device
    dtype = torch.promote_types(samples.query.dtype, torch.float32)
    sums = torch.zeros(2 + len(windows) + len(sinks), dtype=torch.float64, device=device)
    drawn: tuple[list[_Pairs], list[_Pairs]] = ([], [])
    for row, key in enumerate(samples.key):
        query = samples.query[row].unflatten(0, (key.shape[0], -1))
        valid = torch.ones(size, dtype=torch.bool, device=device)
        if samples.key_mask is not None:
            valid = samples.key_mask[row]
        rank = valid.cumsum(0).where(valid, size + 1)
        positions = torch.arange(query.shape[2], device=device)
        if samples.query_mask is not None:
            positions = positions[samples.query_mask[row]]
        if len(positions) > _MAX_QUERIES:
            some = torch.linspace(0, len(positions) - 1, _MAX_QUERIES, device=device)
            positions = positions[some.long()]
        for part in positions.split(_QUERY_BLOCK):
            offset = torch.arange(size, device=device) - part[:, None]
            allowed = valid & (offset <= 0) if samples.is_causal else valid.expand(len(part), size)
            logits = query[:, :, part].to(dtype) @ key.to(dtype).unsqueeze(1).mT * samples.scale
            # The softmax of a query without keys is NaN.
            weights = logits.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
            by_key = weights.double().sum((0, 1))
            top = weights.topk(min(TOP_KEYS, size), dim=-1).values
            parts = [by_key, top.double()]
            parts += [by_key[offset.abs() <= window] for window in windows]
            parts += [by_key[:, rank <= count] for count in sinks]
            sums += torch.stack([x.sum() for x in parts])
            seen = allowed.any(-1)
            queries = query[:, :, part[seen]].repeat_interleave(_PAIRS_PER_QUERY, dim=2)
            even = allowed[seen].to(dtype).expand(*weights.shape[:2], -1, -1)
            for pairs, odds in zip(drawn, (even, weights[:, :, seen]), strict=True):
                places = torch.multinomial(
                    odds.flatten(0, 2).cpu(), _PAIRS_PER_QUERY, replacement=True, generator=random
                )
                places = places.to(device).view(len(key), -1, 1).expand(-1, -1, head_dim)
                pairs.append((queries.flatten(1, 2), key.gather(1, places)))
    root = math.sqrt(samples.scale)
    evenly, attended = (
        (
            torch.cat([query for query, _ in pairs], 1).double() * root,
            torch.cat([key for _, key in pairs], 1).double() * root,
        )
        for pairs in drawn
    )
    return evenly, attended, (sums / sums[0]).tolist()


def _mean_norm(x: Tensor, mask: Tensor | None = None) -> float:
    norms = x.double().square().sum(-1).mean(1)
    return float((norms if mask is None else norms[mask]).mean())
