"""What queries and keys are like, and what that means for features.

Everything is an average over pairs of a query and a key, drawn in two ways: evenly from all pairs
that may meet, and from attention (a query, then a key with the probability that softmax gives it).
The second kind decides the error of the output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from performers.features import SoftmaxFeatures
from performers.features.softmax import Estimator
from performers.features.theory import log_relative_variance
from performers.planning.exact import attention_rows
from performers.planning.fits import Fits
from performers.planning.samples import Samples

# A kernel estimate off by less than this, where attention is, is worth having.
WANTED_KERNEL_ERROR = 0.5
TOP_KEYS = 16
_QUERIES = 512
_COMPARED: tuple[Estimator, ...] = ("positive", "data_aware")
_PAIRS_PER_QUERY = 8


@dataclass(frozen=True)
class FeatureVariance:
    """``Var[estimate] / exp(2 q . k)`` of one feature with independent rows, closed form.

    Attributes:
        estimator: Which; those that are calibrated are so here, with no exact terms.
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
        centred_sum_norm: Evenly drawn pairs again, ``q + k`` less its mean over them.
        calibrated_sum_norm: Over pairs drawn from attention, after the balance of queries and
            keys and less the centre that ``data_aware`` found.
        effective_dimension: Participation ratio ``(sum l)^2 / sum l^2`` of the eigenvalues of
            ``Cov(q + k)``, evenly drawn pairs.
        variances: Of one ``positive`` and one calibrated ``data_aware`` feature.
        window_shares: Share of attention within each window, by window.
        sink_shares: Share of attention on the first keys, by their number.
        top_share: Share of attention on each query's ``TOP_KEYS`` largest keys.
        features_suffice: Whether features alone are enough; see ``sentence``.
        sentence: That, with the numbers it follows from.
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
    """Look at sequences that nothing was calibrated on."""
    widths = sorted({window for window in windows if window is not None} or {64})
    if samples.query.shape[2] != samples.key.shape[2]:
        widths = []
    numbers = sorted({number for number in sinks if number} or {4})
    shares = _Shares(widths, numbers)
    root = math.sqrt(samples.scale)
    evenly, attended = _draw_pairs(samples, shares, torch.Generator().manual_seed(seed))
    total = (evenly.query + evenly.key).double() * root
    centred = total - total.mean(1, keepdim=True)
    spectrum = torch.linalg.eigvalsh(centred.mT @ centred / centred.shape[1]).clamp_min(0)
    heads = samples.key.shape[1]
    variances = []
    features = [fits.features(name, heads) for name in _COMPARED]
    for fit in features:
        even, near = (_log_variance(fit, pairs, samples.scale) for pairs in (evenly, attended))
        log10 = float(near.mean()) / math.log(10)
        variances.append(
            FeatureVariance(
                fit.estimator,
                float(even.median()) / math.log(10),
                log10,
                log10 - 2 * math.log10(WANTED_KERNEL_ERROR),
            )
        )
    best = min(variances, key=lambda variance: variance.log10_attended)
    suffice = best.kernel_error(most_features) <= WANTED_KERNEL_ERROR
    window_shares, sink_shares, top_share = shares.means()
    return Diagnosis(
        query_norm=_mean_norm(samples.query, samples.counted()) * samples.scale,
        key_norm=_mean_norm(samples.key, samples.key_mask) * samples.scale,
        sum_norm=float(total.square().sum(-1).mean()),
        attended_sum_norm=_sum_norm(attended.query, attended.key) * samples.scale,
        centred_sum_norm=float(centred.square().sum(-1).mean()),
        calibrated_sum_norm=_calibrated_norm(features[1], attended, root),
        effective_dimension=_effective_dimension(spectrum),
        variances=tuple(variances),
        window_shares=window_shares,
        sink_shares=sink_shares,
        top_share=top_share,
        features_suffice=suffice,
        sentence=_sentence(
            variances, suffice, most_features, window_shares, sink_shares, top_share
        ),
    )


@dataclass(frozen=True)
class _Pairs:
    """Queries and keys that belong together, each ``(Hkv, pairs, D)``."""

    query: Tensor
    key: Tensor


class _Shares:
    """Sums of attention, over the queries that were looked at."""

    def __init__(self, windows: list[int], sinks: list[int]) -> None:
        self._window = dict.fromkeys(windows, 0.0)
        self._sink = dict.fromkeys(sinks, 0.0)
        self._top = self._whole = 0.0

    def add(self, weights: Tensor, positions: Tensor, rank: Tensor) -> None:
        """Add rows ``(Hkv, G, n, S)`` of queries at ``(n,)``; ``rank`` counts keys."""
        by_key = weights.double().sum((0, 1))
        distance = (torch.arange(weights.shape[-1], device=rank.device) - positions[:, None]).abs()
        for window in self._window:
            self._window[window] += float(by_key[distance <= window].sum())
        for sinks in self._sink:
            self._sink[sinks] += float(by_key[:, rank <= sinks].sum())
        count = min(TOP_KEYS, weights.shape[-1])
        self._top += float(weights.topk(count, dim=-1).values.double().sum())
        self._whole += float(by_key.sum())

    def means(self) -> tuple[dict[int, float], dict[int, float], float]:
        """Shares of the whole."""
        windows = {window: part / self._whole for window, part in self._window.items()}
        sinks = {number: part / self._whole for number, part in self._sink.items()}
        return windows, sinks, self._top / self._whole


def _draw_pairs(
    samples: Samples, shares: _Shares, random: torch.Generator
) -> tuple[_Pairs, _Pairs]:
    """Pairs drawn evenly and from attention, of every sequence; attention goes to ``shares``."""
    size, device = samples.key.shape[2], samples.key.device
    counted = samples.counted()
    drawn: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
    for row in range(samples.query.shape[0]):
        positions = torch.arange(samples.query.shape[2], device=device)
        if counted is not None:
            positions = positions[counted[row]]
        if len(positions) > _QUERIES:
            some = torch.linspace(0, len(positions) - 1, _QUERIES, device=device).long()
            positions = positions[some]
        taking = torch.ones(size, dtype=torch.bool, device=device)
        if samples.key_mask is not None:
            taking = samples.key_mask[row]
        rank = taking.cumsum(0).where(taking, size + 1)
        for part, weights in attention_rows(samples, row, positions):
            shares.add(weights, part, rank)
            key_heads, groups = weights.shape[:2]
            allowed = taking.expand(len(part), size)
            if samples.is_causal:
                allowed = allowed & (torch.arange(size, device=device) <= part[:, None])
            seen = allowed.any(-1)
            queries = samples.query[row].unflatten(0, (key_heads, groups))[:, :, part[seen]]
            queries = queries.repeat_interleave(_PAIRS_PER_QUERY, dim=2).flatten(1, 2)
            even = allowed[seen].to(weights.dtype).expand(key_heads, groups, -1, -1)
            for pairs, odds in zip(drawn, (even, weights[:, :, seen]), strict=True):
                places = torch.multinomial(
                    odds.flatten(0, 2).cpu(), _PAIRS_PER_QUERY, replacement=True, generator=random
                )
                places = places.to(device).view(key_heads, -1, 1)
                places = places.expand(-1, -1, samples.key.shape[3])
                pairs.append((queries, samples.key[row].gather(1, places)))
    evenly, attended = (
        _Pairs(*(torch.cat(tensors, dim=1) for tensors in zip(*pairs, strict=True)))
        for pairs in drawn
    )
    return evenly, attended


def _log_variance(fit: SoftmaxFeatures, pairs: _Pairs, scale: float) -> Tensor:
    """Natural logarithms for one feature, ``(Hkv, pairs)``, without the -inf of ``q + k = 0``."""
    logs = log_relative_variance(fit, pairs.query, pairs.key, scale)
    return logs.clamp_min(math.log(torch.finfo(logs.dtype).eps))


def _mean_norm(x: Tensor, counted: Tensor | None) -> float:
    norms = x.double().square().sum(-1).mean(1)
    return float((norms if counted is None else norms[counted]).mean())


def _sum_norm(query: Tensor, key: Tensor) -> float:
    return float((query.double() + key.double()).square().sum(-1).mean())


def _calibrated_norm(fit: SoftmaxFeatures, pairs: _Pairs, root: float) -> float:
    """``E |M q + M^{-T} k - c|^2``."""
    form = fit.form().to(torch.float64)
    query = form.transformed(pairs.query.double() * root, is_query=True)
    key = form.transformed(pairs.key.double() * root, is_query=False)
    return _sum_norm(query, key - fit.center.double().unsqueeze(1))


def _effective_dimension(spectrum: Tensor) -> float:
    """Mean over heads of ``(sum l)^2 / sum l^2``; one where nothing varies."""
    square, squares = spectrum.sum(-1).square(), spectrum.square().sum(-1)
    return float((square / squares).where(squares > 0, 1.0).mean())


def _sentence(
    variances: list[FeatureVariance],
    suffice: bool,
    most_features: int,
    window_shares: dict[int, float],
    sink_shares: dict[int, float],
    top_share: float,
) -> str:
    best = min(variances, key=lambda variance: variance.log10_attended)
    powers = " and ".join(
        f"e^{variance.log10_attended * math.log(10):.1f} ({variance.estimator})"
        for variance in variances
    )
    exponent = (best.log10_attended - math.log10(most_features)) / 2
    left = f"{10**exponent:.2g}" if exponent < 3 else f"10^{exponent:.0f}"
    power = max(0.0, best.log10_features_needed)
    needed = f"{math.ceil(10**power):,}" if power < 6 else f"10^{power:.0f}"
    held = [f"{share:.0%} is within {window} positions" for window, share in window_shares.items()]
    held += [f"{share:.0%} on the first {count} keys" for count, share in sink_shares.items()]
    held.append(f"{top_share:.0%} on the {TOP_KEYS} largest keys of each query")
    return (
        f"Features alone {'can' if suffice else 'cannot'} do it: where attention is, one feature "
        f"has a relative variance of {powers}, so that {most_features} leave the kernel off by "
        f"{left} times its size (for {WANTED_KERNEL_ERROR} it takes {needed} features). Of the "
        f"attention, {', '.join(held)}{'' if suffice else ': meet such keys exactly'}."
    )
