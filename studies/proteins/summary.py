"""Means over seeds, and verdicts on the paper's claims by a paired bootstrap."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

METRICS = ("accuracy", "perplexity")

_REPLICATES = 4000
_CHUNK = 200


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


Counts: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Correct predictions and targets, each ``(sequences,)``."""


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
        counts: Correct predictions and targets of each sequence, by split and then seed; empty
            for runs that were scored without.
    """

    objective: str
    attention: str
    scores: dict[tuple[str, str], Spread]
    baseline: dict[tuple[str, str], float]
    seconds: Spread
    parameters: int
    counts: dict[str, dict[int, Counts]]


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
        counts = {
            split: {
                seed: (
                    np.array(run["scores"][split]["correct_by_sequence"]),
                    np.array(run["scores"][split]["tokens_by_sequence"]),
                )
                for seed, run in found.items()
                if "correct_by_sequence" in run["scores"][split]
            }
            for split in first["scores"]
        }
        rows.append(Row(*key, scores, baseline, seconds, first["parameters"], counts))
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
        interval: 95% confidence interval of the difference; see `paired_interval`.
        obstacle: Reason why there is no verdict.
    """

    text: str
    difference: Spread
    least: float
    strict: bool
    interval: tuple[float, float] | None = None
    obstacle: str = ""

    @property
    def verdict(self) -> str:
        """A word where the interval lies on one side of ``least``; "undecided" elsewhere."""
        if self.obstacle or self.interval is None:
            return f"none: {self.obstacle or 'no scores by sequence'}"
        low, high = self.interval
        if low > self.least or (low >= self.least and not self.strict):
            return "holds"
        if high < self.least or (high <= self.least and self.strict):
            return "does not hold"
        return "undecided"


def paired_interval(
    ahead: Mapping[int, Counts], behind: Mapping[int, Counts]
) -> tuple[float, float]:
    """95% confidence interval of a difference of accuracies, in percentage points.

    A bootstrap with two levels: each replicate draws sequences with replacement, the same ones for
    both models and all seeds, and then seeds; percentiles of the replicates. Few seeds make it too
    narrow rather than too wide.

    Args:
        ahead: Counts by seed.
        behind: Counts on the same sequences and targets, by the same seeds.

    Raises:
        ValueError: The two were not scored on the same targets.
    """
    seeds = sorted(ahead)
    tokens = np.stack([ahead[seed][1] for seed in seeds])
    if not np.array_equal(tokens, np.stack([behind[seed][1] for seed in seeds])):
        raise ValueError("ahead, behind: expected counts of the same targets")
    won = np.stack([ahead[seed][0] - behind[seed][0] for seed in seeds])
    random = np.random.default_rng(0)
    sequences = tokens.shape[1]
    shares = np.full(sequences, 1 / sequences)
    found = []
    for _ in range(_REPLICATES // _CHUNK):
        drawn = random.multinomial(sequences, shares, size=_CHUNK)
        differences = (drawn @ won.T) / np.maximum(drawn @ tokens.T, 1)
        chosen = random.integers(len(seeds), size=differences.shape)
        found.append(np.take_along_axis(differences, chosen, axis=1).mean(1))
    low, high = 100 * np.percentile(np.concatenate(found), (2.5, 97.5))
    return float(low), float(high)


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
                interval, obstacle = _judge(high, low, split, both)
                claim = Claim(f"{word}: {text}", difference, least, strict, interval, obstacle)
                found.append(claim)
    return found


def _judge(
    high: Row, low: Row, split: str, seeds: Sequence[int]
) -> tuple[tuple[float, float] | None, str]:
    """Confidence interval of a difference, and the reason why it allows no verdict."""
    counts = [
        {seed: row.counts[split][seed] for seed in seeds if seed in row.counts[split]}
        for row in (high, low)
    ]
    interval = None
    if all(len(part) == len(seeds) for part in counts):
        interval = paired_interval(*counts)
    if len(seeds) < 2:
        return interval, "one seed"
    for row in (high, low):
        if row.scores[split, "accuracy"].mean <= row.baseline[split, "accuracy"]:
            return interval, f"{row.attention} is not above the frequency baseline"
    return interval, ""
