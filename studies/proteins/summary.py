"""Means over seeds, and verdicts on the paper's claims."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("accuracy", "perplexity")


@dataclass(frozen=True)
class Spread:
    """A number by seed."""

    values: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values.values())

    @property
    def sd(self) -> float | None:
        """The sample standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def text(self, digits: int = 2, factor: float = 1.0) -> str:
        """``mean ± sd``."""
        shown = f"{factor * self.mean:.{digits}f}"
        return shown if self.sd is None else f"{shown} ± {factor * self.sd:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One attention under one objective.

    Attributes:
        objective: ``"mlm"`` or ``"clm"``.
        attention: Its name.
        scores: Spread over seeds by (split, metric).
        baseline: The unigram baseline on the same residues by (split, metric).
        seconds: Seconds of training.
        parameters: Parameters of the model.
    """

    objective: str
    attention: str
    scores: dict[tuple[str, str], Spread]
    baseline: dict[tuple[str, str], float]
    seconds: Spread
    parameters: int


def summarise(results: Iterable[Mapping[str, Any]], attentions: Sequence[str]) -> list[Row]:
    """A row for every objective and attention that has results, masked before causal.

    Args:
        results: Contents of ``result.json``.
        attentions: Attentions in the order of the rows.
    """
    grouped: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for result in results:
        grouped[result["objective"], result["attention"]][result["seed"]] = result
    rows = []
    for key in ((x, y) for x in ("mlm", "clm") for y in attentions):
        if not (found := dict(sorted(grouped.get(key, {}).items()))):
            continue
        first = next(iter(found.values()))
        cells = [(split, metric) for split in first["scores"] for metric in METRICS]
        scores = {
            (split, metric): Spread({s: run["scores"][split][metric] for s, run in found.items()})
            for split, metric in cells
        }
        baseline = {
            (split, metric): first["scores"][split][f"baseline_{metric}"] for split, metric in cells
        }
        seconds = Spread({seed: run["seconds"] for seed, run in found.items()})
        rows.append(Row(*key, scores, baseline, seconds, first["parameters"]))
    return rows


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the difference that bears it out or not.

    Attributes:
        text: The claim.
        difference: Difference by seed that should be at least ``least``, percentage points of
            accuracy.
        least: See ``difference``.
        strict: Whether it should be more than ``least``.
    """

    text: str
    difference: Spread
    least: float
    strict: bool

    @property
    def verdict(self) -> str:
        """A word; a difference within one standard deviation of ``least`` decides nothing."""
        over = self.difference.mean - self.least
        if self.difference.sd is not None and abs(over) < self.difference.sd:
            return "undecided"
        return "holds" if (over > 0 if self.strict else over >= 0) else "does not hold"


# Text, the attention ahead, the one behind, the split, the least difference, and whether a tie is
# not enough.
_CLAIMS = (
    ("Performer-ReLU at least as accurate as the Transformer, test",
     "favor-relu", "exact", "test", 0.0, False),
    ("Reformer below the Transformer, test", "exact", "lsh", "test", 0.0, True),
    ("Linformer below the Transformer, test", "exact", "linformer", "test", 0.0, True),
    ("Reformer below Performer-ReLU, test", "favor-relu", "lsh", "test", 0.0, True),
    ("Linformer below Performer-ReLU, test", "favor-relu", "linformer", "test", 0.0, True),
    ("Transformer ahead of Performer-ReLU out of distribution",
     "exact", "favor-relu", "ood", 0.0, True),
    ("Transformer ahead of Performer-softmax out of distribution",
     "exact", "favor-softmax", "ood", 0.0, True),
    ("Performer-softmax within half a point of the Transformer, test",
     "favor-softmax", "exact", "test", -0.5, False),
)  # fmt: skip


def claims(rows: Iterable[Row]) -> list[Claim]:
    """The paper's claims on accuracy (Choromanski et al. 2021, section 4.4), as measured."""
    by_name = {(row.objective, row.attention): row for row in rows}
    found = []
    for objective, word in (("mlm", "masked"), ("clm", "causal")):
        for text, above, below, split, least, strict in _CLAIMS:
            high, low = by_name.get((objective, above)), by_name.get((objective, below))
            if high is None or low is None:
                continue
            one, other = (row.scores[split, "accuracy"].values for row in (high, low))
            both = sorted(one.keys() & other.keys())
            if both:
                difference = Spread({seed: 100 * (one[seed] - other[seed]) for seed in both})
                found.append(Claim(f"{word}: {text}", difference, least, strict))
    return found
