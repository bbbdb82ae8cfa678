"""Errors on held-out sequences, and times next to ``scaled_dot_product_attention``."""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from performers.planning.exact import exact_attention, relative_error
from performers.planning.fits import Fits
from performers.planning.samples import Samples
from performers.planning.settings import Setting

ROUNDS = 3
# Times that exact attention is timed in a round: all ratios refer to it.
_EXACT_PER_ROUND = 4
# A time below this share of another is clearly less.
_CLEARLY = 1 / 2


class Progress:
    """A line on stderr, if that is a terminal."""

    def __init__(self, show: bool) -> None:
        self._stream = sys.stderr if show and sys.stderr and sys.stderr.isatty() else None
        self._width = 0

    def write(self, text: str, end: str = "") -> None:
        """Replace the line."""
        if self._stream is not None:
            self._stream.write(f"\r{text:{self._width}}{end}")
            self._stream.flush()
            self._width = len(text)


def attend(
    setting: Setting, samples: Samples, fits: Fits, draw: int, backend: str | None
) -> Callable[[], Tensor]:
    """A prepared call of ``favor_attention``."""
    favor = fits.attention(setting, setting.num_heads(samples), draw)
    tensors = samples.query, samples.key, samples.value
    return lambda: favor(*tensors, **samples.options, backend=backend)[0]


def measure_errors(
    setting: Setting,
    samples: Samples,
    exact: Tensor,
    fits: Fits,
    num_draws: int,
    backend: str | None,
) -> Setting:
    """The setting with its errors, and the seconds of its fastest call over the sequences."""
    mask = samples.query_mask
    totals, heads, seconds = [], [], []
    for draw in range(num_draws):
        out, taken = timed(attend(setting, samples, fits, draw, backend), samples.query.device)
        expected = exact
        if mask is not None:
            out, expected = (x.where(mask[:, None, :, None], 0.0) for x in (out, exact))
        totals.append(relative_error(out, expected, (1, 2, 3)))
        heads.append(relative_error(out, expected, (2, 3)))
        seconds.append(taken / len(out))
    total = torch.cat(totals)
    return replace(
        setting,
        error=float(total.mean()),
        error_sd=float(total.std()) if len(total) > 1 else None,
        head_errors=tuple(torch.cat(heads).mean(0).tolist()),
        seconds=min(seconds),
    )


def measure_times(
    settings: Sequence[Setting],
    samples: Samples,
    fits: Fits,
    backend: str | None,
    progress: Progress,
    seed: int,
) -> tuple[list[Setting], float]:
    """Settings with the seconds of one call on one sequence, and those of exact attention.

    Settings that can be on the Pareto front are timed in rounds, each once in a round and in
    another order, with ``scaled_dot_product_attention``, so that a slow spell of the machine
    affects all. The median counts. A setting cannot be on the front if another had no more error
    and took less than half of its time when errors were measured; its time is that one, times the
    median change of the times of the others.
    """
    candidates = [
        one
        for one in settings
        if not any(x.error <= one.error and x.seconds < _CLEARLY * one.seconds for x in settings)
    ]
    groups = samples.query.shape[1] // samples.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (samples.key, samples.value))
    exact = partial(exact_attention, samples.query, key, value, **samples.options)
    exact()
    order, device = random.Random(seed), samples.query.device
    seconds: dict[Setting, list[float]] = {setting: [] for setting in candidates}
    exact_seconds: list[float] = []
    interval = max(1, len(candidates) // _EXACT_PER_ROUND)
    for turn in range(ROUNDS):
        for place, setting in enumerate(order.sample(candidates, len(candidates))):
            if place % interval == 0:
                exact_seconds.append(timed(exact, device)[1])
            call = attend(setting, samples, fits, 0, backend)
            if not seconds[setting]:
                # The first call allocates.
                call()
            seconds[setting].append(timed(call, device)[1])
            done = turn * len(candidates) + place + 1
            progress.write(f"plan: times {done}/{ROUNDS * len(candidates)}")
    medians = {setting: statistics.median(values) for setting, values in seconds.items()}
    change = statistics.median(median / setting.seconds for setting, median in medians.items())
    unit = statistics.median(exact_seconds)
    measured = []
    for setting in settings:
        taken = medians.get(setting, change * setting.seconds)
        measured.append(
            replace(setting, seconds=taken, timed=setting in medians, ratio=taken / unit)
        )
    return measured, unit


def timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The result of a call and its seconds, work queued on the device included."""
    _synchronize(device)
    start = time.perf_counter()
    out = call()
    _synchronize(device)
    return out, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
