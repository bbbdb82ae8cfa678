"""Errors on held-out sequences, and times beside ``scaled_dot_product_attention``."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from performers.attention import favor_attention
from performers.planning.building import Workshop
from performers.planning.exact import fused_attention
from performers.planning.progress import Progress
from performers.planning.samples import Samples
from performers.planning.settings import Options

ROUNDS = 3
# The call that all ratios refer to is timed this often in a round.
_FUSED_CALLS = 4
# So much less time than another setting takes is no chance.
_CLEARLY = 1 / 2


class Errors(NamedTuple):
    """``|out - exact| / |exact|`` of one setting, one row for each draw and sequence.

    Attributes:
        total: Over all heads, shape ``(n,)``.
        heads: For each query head, shape ``(n, H)``.
        seconds: The shortest call, over the number of sequences.
    """

    total: Tensor
    heads: Tensor
    seconds: float

    @property
    def mean(self) -> float:
        """Mean of ``total``."""
        return float(self.total.mean())


def attend(
    options: Options, samples: Samples, workshop: Workshop, draw: int, backend: str | None
) -> Callable[[], Tensor]:
    """A call of ``favor_attention`` with everything prepared."""
    features, listed_keys = workshop.features(options, draw), workshop.buckets(options)

    def call() -> Tensor:
        return favor_attention(
            samples.query,
            samples.key,
            samples.value,
            features,
            is_causal=samples.is_causal,
            key_mask=samples.key_mask,
            scale=samples.scale,
            window=options.window,
            sinks=options.sinks,
            listed_keys=listed_keys,
            backend=backend,
        )

    return call


def measure_errors(
    options: Options,
    samples: Samples,
    exact: Tensor,
    workshop: Workshop,
    num_draws: int,
    backend: str | None,
) -> Errors:
    """Errors of a setting over some draws.

    Args:
        options: The setting.
        samples: Sequences that nothing was calibrated on.
        exact: Their exact attention, shape ``(B, H, L, Dv)``.
        workshop: Where feature maps come from.
        num_draws: Draws of the projection.
        backend: Of ``favor_attention``.

    Returns:
        One error for each draw and sequence.
    """
    totals, heads, seconds = [], [], []
    counted = samples.counted()
    for draw in range(num_draws):
        call = attend(options, samples, workshop, draw, backend)
        out, taken = _timed(call, samples.query.device)
        seconds.append(taken / len(out))
        total, each = relative_errors(out, exact, counted)
        totals.append(total)
        heads.append(each)
    return Errors(torch.cat(totals), torch.cat(heads), min(seconds))


def relative_errors(out: Tensor, exact: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """``|out - exact| / |exact|`` of every sequence, ``(B,)``, and of every head, ``(B, H)``.

    Args:
        out: Shape ``(B, H, L, Dv)``.
        exact: The same.
        counted: Queries that count, ``(B, L)``; None for all.
    """
    out, exact = out.double(), exact.double()
    if counted is not None:
        out, exact = (x.masked_fill(~counted[:, None, :, None], 0.0) for x in (out, exact))
    wrong, size = ((x.square().sum((2, 3))) for x in (out - exact, exact))
    # A head whose output is zero is off by nothing or by more than can be said: one then.
    each = (wrong / size).sqrt().where(size > 0, (wrong > 0).double())
    return (wrong.sum(1) / size.sum(1)).sqrt().cpu(), each.cpu()


def measure_times(
    settings: Sequence[Options],
    errors: Sequence[Errors],
    samples: Samples,
    workshop: Workshop,
    backend: str | None,
    progress: Progress,
    seed: int,
) -> tuple[list[tuple[float, bool]], float]:
    """Seconds of one call on one sequence, of every setting.

    Settings that can be on the front of error against time are timed in rounds, each once in a
    round and in another order, ``scaled_dot_product_attention`` with them; a machine that slows
    down for a while then does so for all. The median counts. The others are those with another
    setting beside them that had no more error and took less than half of the time when errors
    were measured. Theirs is that time, times the median of what it changed by for the former.

    Args:
        settings: What to time.
        errors: What was measured of them.
        samples: One sequence.
        workshop: Where feature maps come from.
        backend: Of ``favor_attention``.
        progress: Told of every call.
        seed: Of the orders.

    Returns:
        Seconds and whether they are from the rounds, of every setting, and the seconds of
        ``scaled_dot_product_attention``.
    """
    candidates = [i for i in range(len(settings)) if not _is_beaten(i, errors)]
    order = random.Random(seed)
    fused = fused_attention(samples)
    taken: dict[int, list[float]] = {index: [] for index in candidates}
    fused_taken: list[float] = []
    fused()
    progress.start("times", ROUNDS * len(candidates))
    often = max(1, len(candidates) // _FUSED_CALLS)
    for _ in range(ROUNDS):
        for place, index in enumerate(order.sample(candidates, len(candidates))):
            if place % often == 0:
                fused_taken.append(_timed(fused, samples.query.device)[1])
            call = attend(settings[index], samples, workshop, 0, backend)
            if not taken[index]:
                # The first call allocates.
                call()
            taken[index].append(_timed(call, samples.query.device)[1])
            progress.step()
    medians = {index: statistics.median(seconds) for index, seconds in taken.items()}
    change = statistics.median(medians[index] / errors[index].seconds for index in candidates)
    seconds = [
        (medians[index], True) if index in medians else (change * errors[index].seconds, False)
        for index in range(len(settings))
    ]
    return seconds, statistics.median(fused_taken)


def _is_beaten(index: int, errors: Sequence[Errors]) -> bool:
    mine = errors[index]
    return any(
        other.mean <= mine.mean and other.seconds < _CLEARLY * mine.seconds for other in errors
    )


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    _wait(device)
    start = time.perf_counter()
    out = call()
    _wait(device)
    return out, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
