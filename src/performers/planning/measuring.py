"""Errors on held-out sequences, and times beside ``scaled_dot_product_attention``."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from performers.planning.exact import fused_attention
from performers.planning.fits import Fits
from performers.planning.progress import Progress
from performers.planning.samples import Samples
from performers.planning.settings import Setting

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
    setting: Setting, samples: Samples, fits: Fits, draw: int, backend: str | None
) -> Callable[[], Tensor]:
    """A call of ``favor_attention`` with everything prepared."""
    favor = fits.attention(setting, setting.num_heads(samples), draw)

    def call() -> Tensor:
        out: Tensor = favor(
            samples.query,
            samples.key,
            samples.value,
            is_causal=samples.is_causal,
            key_mask=samples.key_mask,
            scale=samples.scale,
            backend=backend,
        )[0]
        return out

    return call


def measure_errors(
    setting: Setting,
    samples: Samples,
    exact: Tensor,
    fits: Fits,
    num_draws: int,
    backend: str | None,
) -> Errors:
    """Errors of a setting over some draws."""
    totals, heads, seconds = [], [], []
    counted = samples.counted()
    for draw in range(num_draws):
        call = attend(setting, samples, fits, draw, backend)
        out, taken = _timed(call, samples.query.device)
        seconds.append(taken / len(out))
        total, each = relative_errors(out, exact, counted)
        totals.append(total)
        heads.append(each)
    return Errors(torch.cat(totals), torch.cat(heads), min(seconds))


def relative_errors(out: Tensor, exact: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """``|out - exact| / |exact|`` of every sequence, ``(B,)``, and of every head, ``(B, H)``."""
    out, exact = out.double(), exact.double()
    if counted is not None:
        out, exact = (x.masked_fill(~counted[:, None, :, None], 0.0) for x in (out, exact))
    wrong, size = ((x.square().sum((2, 3))) for x in (out - exact, exact))
    # A head whose output is zero is off by nothing or by more than can be said: one then.
    each = (wrong / size).sqrt().where(size > 0, (wrong > 0).double())
    return (wrong.sum(1) / size.sum(1)).sqrt().cpu(), each.cpu()


def measure_times(
    settings: Sequence[Setting],
    errors: Sequence[Errors],
    samples: Samples,
    fits: Fits,
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
            call = attend(settings[index], samples, fits, 0, backend)
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
