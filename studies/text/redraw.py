"""Redraws of random features: a model under its own draw and others, and what predicts the gap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from performers.convert.families.base import pre_hooks
from performers.features import redraw_features_
from performers.features.theory import log_relative_variance
from performers.models import PerformerForCausalLM
from performers.nn import FavorAttention
from performers.streams.text import Texts
from studies.pages import Table
from studies.parts import Part


class Schedule(NamedTuple):
    """Steps between redraws, 0 for none, and whether rows are of 8,192 bytes, or else of 256."""

    steps: int
    long: bool

    def __str__(self) -> str:
        return f"every {self.steps} steps" if self.steps else "never"


REDRAWS = {
    "fixed": Schedule(0, False),
    "every_100": Schedule(100, False),
    "every_10": Schedule(10, False),
    "long_fixed": Schedule(0, True),
    "long_every_50": Schedule(50, True),
    "long_every_5": Schedule(5, True),
}
"""Models by their names."""

FRESH = 5
_PAIRS = 2048
_STATISTICS = ("norm_random", "norm_attended", "log_variance_random", "log_variance_attended")


def measure_draws(
    model: PerformerForCausalLM, texts: Texts, bits: Callable[[], float], context: int
) -> dict[str, Any]:
    """Bits per byte under the draw that a model was trained with last, and under fresh ones.

    Returns:
        ``own``, ``fresh`` (a list), and ``layers``: of each layer the mean of ``|q + k|^2``
        (scaled) and the median of the logarithm of the relative variance of the kernel's estimate,
        of pairs at random and of pairs as exact softmax attention would draw them.
    """
    layers = _statistics(model, torch.from_numpy(texts.read(0, 0, context))[None])
    own, fresh = bits(), []
    for draw in range(FRESH):
        redraw_features_(model, torch.Generator().manual_seed(1000 + draw))
        fresh.append(bits())
    return {"own": own, "fresh": fresh, "layers": layers}


@torch.no_grad()
def _statistics(model: PerformerForCausalLM, tokens: Tensor) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    generator = torch.Generator().manual_seed(0)

    def look(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        query, key = inputs[0][0], inputs[1][0]
        length = query.shape[-2]
        rows = torch.randint(length // 2, length, (_PAIRS,), generator=generator)
        entry: dict[str, float] = {}
        scores = query[:, rows] @ key.mT / query.shape[-1] ** 0.5
        future = torch.arange(length) > rows[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        uniform = (~future).float().expand_as(weights)
        for name, share in (("random", uniform), ("attended", weights)):
            columns = torch.multinomial(share.flatten(0, 1), 1, generator=generator)
            columns = columns.view(len(query), _PAIRS)
            chosen = key.gather(1, columns[..., None].expand(-1, -1, key.shape[-1]))
            total = (query[:, rows] + chosen) * query.shape[-1] ** -0.25
            entry[f"norm_{name}"] = float(total.square().sum(-1).mean())
            variance = log_relative_variance(module.feature_map, query[:, rows], chosen)
            entry[f"log_variance_{name}"] = float(variance.median())
        found.append(entry)

    with pre_hooks({x: look for x in model.modules() if isinstance(x, FavorAttention)}):
        model.eval()(tokens, use_cache=False)
    return found


def redraw_tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """Own and fresh draws, and the statistics of queries and keys."""
    done = {name: parts[name] for name in REDRAWS if name in parts}
    if not done:
        return {}
    rows, layers = [], []
    for key, part in done.items():
        names = (f"{part['length']:,}", str(REDRAWS[key]))
        own, fresh = part["own"], part["fresh"]
        mean = fmean(fresh)
        draws = (f"{own:.3f}", f"{mean:.3f}", f"{min(fresh):.3f}–{max(fresh):.3f}")
        rows.append((*names, f"{part['steps']:,}", *draws, f"{mean - own:+.3f}"))
        for number, entry in enumerate(part["layers"]):
            figures = (f"{entry[x]:.2f}" for x in _STATISTICS)
            layers.append((*names, str(number), *figures))
    columns = ("steps", "own draw", "five fresh draws", "their range", "fresh − own")
    headings = ("layer", "mean, random", "mean, attended", "ln var, random", "attended")
    return {
        "redraws": Table(("rows", "redrawn", *columns), rows, names=2),
        "variances": Table(("rows", "redrawn", *headings), layers, names=3),
    }
