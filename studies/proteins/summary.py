"""From results to tables: mean and standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("accuracy", "perplexity")


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        mean: Their mean.
        sd: Their sample standard deviation; None for a single seed.
        values: The numbers, by seed.
    """

    mean: float
    sd: float | None
    values: dict[int, float]

    @classmethod
    def of(cls, values: Mapping[int, float]) -> Spread:
        """Mean and standard deviation of {seed: value}."""
        numbers = [values[seed] for seed in sorted(values)]
        sd = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(statistics.fmean(numbers), sd, dict(sorted(values.items())))

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
        scores: (split, metric) to the spread over seeds.
        baseline: (split, metric) of the unigram baseline on the same residues.
        seconds: Of training.
        parameters: Of the model.
    """

    objective: str
    attention: str
    scores: dict[tuple[str, str], Spread]
    baseline: dict[tuple[str, str], float]
    seconds: Spread
    parameters: int

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds it was run with."""
        return tuple(self.seconds.values)


def summarise(results: Iterable[Mapping[str, Any]], attentions: Sequence[str]) -> list[Row]:
    """A row for every objective and attention that has results.

    Args:
        results: Of ``comparison.results``.
        attentions: Which ones, in the order of the rows.

    Returns:
        The rows, masked before causal.
    """
    grouped: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for result in results:
        grouped[result["objective"], result["attention"]][result["seed"]] = result
    rows = []
    for objective in ("mlm", "clm"):
        for attention in attentions:
            found = grouped.get((objective, attention))
            if not found:
                continue
            first = found[min(found)]
            cells = [(split, metric) for split in first["scores"] for metric in METRICS]
            rows.append(
                Row(
                    objective,
                    attention,
                    {
                        (split, metric): Spread.of(
                            {seed: run["scores"][split][metric] for seed, run in found.items()}
                        )
                        for split, metric in cells
                    },
                    {
                        (split, metric): first["scores"][split][f"baseline_{metric}"]
                        for split, metric in cells
                    },
                    Spread.of({seed: run["seconds"] for seed, run in found.items()}),
                    first["parameters"],
                )
            )
    return rows


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and whether these runs bear it out.

    Attributes:
        text: The claim.
        difference: Mean over seeds of the difference that should be at least ``least``, in
            percentage points of accuracy.
        sd: Its standard deviation over seeds; None for a single seed.
        least: See ``difference``.
        seeds: Seeds that both sides were run with.
        strict: Whether it should be more than ``least``: who is ahead is ahead by something.
    """

    text: str
    difference: float
    sd: float | None
    least: float
    seeds: int
    strict: bool = False

    @property
    def holds(self) -> bool:
        """Whether the mean difference is large enough."""
        if self.strict:
            return self.difference > self.least
        return self.difference >= self.least

    @property
    def verdict(self) -> str:
        """In words; a difference within one standard deviation of ``least`` decides nothing."""
        if self.sd is not None and abs(self.difference - self.least) < self.sd:
            return "undecided"
        return "holds" if self.holds else "does not hold"


# Text, the one above, the one below, on which split, and whether a tie is not enough.
_CLAIMS = (
    (
        "Performer-ReLU at least as accurate as the Transformer, test",
        "favor-relu",
        "exact",
        "test",
        False,
    ),
    ("Reformer below the Transformer, test", "exact", "lsh", "test", True),
    ("Linformer below the Transformer, test", "exact", "linformer", "test", True),
    ("Reformer below Performer-ReLU, test", "favor-relu", "lsh", "test", True),
    ("Linformer below Performer-ReLU, test", "favor-relu", "linformer", "test", True),
    ("Transformer ahead of Performer-ReLU out of distribution", "exact", "favor-relu", "ood", True),
    (
        "Transformer ahead of Performer-softmax out of distribution",
        "exact",
        "favor-softmax",
        "ood",
        True,
    ),
)


def claims(rows: Iterable[Row]) -> list[Claim]:
    """The paper's claims on accuracy (Choromanski et al. 2021, section 4.4), as measured."""
    by_name = {(row.objective, row.attention): row for row in rows}
    found = []
    for objective, word in (("mlm", "masked"), ("clm", "causal")):
        for text, above, below, split, strict in _CLAIMS:
            claim = _claim(by_name, objective, f"{word}: {text}", above, below, split, 0.0, strict)
            found.append(claim)
        text = f"{word}: Performer-softmax within half a point of the Transformer, test"
        found.append(
            _claim(by_name, objective, text, "favor-softmax", "exact", "test", -0.5, False)
        )
    return [claim for claim in found if claim is not None]


def _claim(
    rows: Mapping[tuple[str, str], Row],
    objective: str,
    text: str,
    above: str,
    below: str,
    split: str,
    least: float,
    strict: bool,
) -> Claim | None:
    high, low = rows.get((objective, above)), rows.get((objective, below))
    if high is None or low is None:
        return None
    one, other = (row.scores[split, "accuracy"].values for row in (high, low))
    both = sorted(one.keys() & other.keys())
    if not both:
        return None
    spread = Spread.of({seed: 100 * (one[seed] - other[seed]) for seed in both})
    return Claim(text, spread.mean, spread.sd, least, len(both), strict)
