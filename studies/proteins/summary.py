"""Means over seeds and, by a paired bootstrap, verdicts on the paper's claims."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

METRICS = ("accuracy", "perplexity")

_REPLICATES = 4000
_CHUNK = 200

Counts: TypeAlias = npt.NDArray[np.int64]
"""Correct predictions and targets, ``(2, sequences)``."""

Row = Mapping[str, Any]
"""One attention under one objective: ``objective``, ``attention``, ``parameters``, ``seconds`` (a
spread), ``scores`` (split to metric to spread) and ``baseline`` (split to metric to the number that
the unigram baseline has on the same residues). Runs that were scored by sequence also give
``counts``: split to seed to correct predictions and targets of each sequence."""


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single seed) of a number by seed."""
    numbers = list(values.values())
    sd = statistics.stdev(numbers) if len(numbers) > 1 else None
    mean = statistics.fmean(numbers)
    return {"mean": mean, "sd": sd, "seeds": len(numbers), "values": dict(values)}


def spread_text(found: Mapping[str, Any], digits: int = 2, factor: float = 1.0) -> str:
    """``mean ± sd``."""
    shown = f"{factor * found['mean']:.{digits}f}"
    return shown if found["sd"] is None else f"{shown} ± {factor * found['sd']:.{digits}f}"


def summarise(results: Iterable[Mapping[str, Any]], attentions: Sequence[str]) -> list[Row]:
    """A row for every objective and attention that has results, masked before causal."""
    grouped: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for result in sorted(results, key=lambda result: result["seed"]):
        grouped[result["objective"], result["attention"]][result["seed"]] = result
    rows: list[Row] = []
    for objective, attention in ((x, y) for x in ("mlm", "clm") for y in attentions):
        runs = grouped.get((objective, attention))
        if not runs:
            continue
        first = next(iter(runs.values()))
        row: dict[str, Any] = {
            "objective": objective,
            "attention": attention,
            "parameters": first["parameters"],
            "seconds": spread({seed: run["seconds"] for seed, run in runs.items()}),
            **{part: {} for part in ("scores", "baseline", "counts")},
        }
        for split, baseline in first["scores"].items():
            scores = {seed: run["scores"][split] for seed, run in runs.items()}
            row["scores"][split] = {
                metric: spread({seed: found[metric] for seed, found in scores.items()})
                for metric in METRICS
            }
            row["baseline"][split] = {m: baseline[f"baseline_{m}"] for m in METRICS}
            row["counts"][split] = {
                seed: [found["correct_by_sequence"], found["tokens_by_sequence"]]
                for seed, found in scores.items()
                if "correct_by_sequence" in found
            }
        rows.append(row)
    return rows


def paired_interval(
    ahead: Mapping[int, Counts], behind: Mapping[int, Counts]
) -> tuple[float, float]:
    """95% confidence interval of a difference of accuracies, in percentage points.

    A bootstrap with two levels: each replicate draws sequences with replacement, the same ones for
    both models and all seeds, and then seeds; percentiles of the replicates. Few seeds make it too
    narrow rather than too wide.

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


def claims(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The paper's claims on accuracy (Choromanski et al. 2021, section 4.4), as measured.

    Returns:
        For each its ``claim``, the ``difference`` (a spread, percentage points of accuracy) that
        should be at least ``least``, or more (``strict``), its 95% ``interval`` (see
        `paired_interval`) or None, and the ``verdict``: a word where the interval lies on one side
        of ``least``, "undecided" elsewhere, and "none" with the reason where there can be none.
    """
    by_name = {(row["objective"], row["attention"]): row for row in rows}
    found = []
    for objective, word in (("mlm", "masked"), ("clm", "causal")):
        for text, above, below, split, least, strict in _CLAIMS:
            high, low = by_name.get((objective, above)), by_name.get((objective, below))
            if high is None or low is None:
                continue
            one, other = (row["scores"][split]["accuracy"]["values"] for row in (high, low))
            both = sorted(one.keys() & other.keys())
            if both:
                difference = spread({seed: 100 * (one[seed] - other[seed]) for seed in both})
                interval = _interval(high, low, split, both)
                obstacle = _obstacle(high, low, split, both)
                found.append(
                    {
                        "claim": f"{word}: {text}",
                        "difference": difference,
                        "least": least,
                        "strict": strict,
                        "interval": interval,
                        "verdict": _verdict(interval, obstacle, least, strict),
                    }
                )
    return found


def _interval(high: Row, low: Row, split: str, seeds: Sequence[int]) -> tuple[float, float] | None:
    """Confidence interval of a difference; None without scores by sequence."""
    ahead, behind = (
        {seed: np.array(counts) for seed, counts in row["counts"][split].items() if seed in seeds}
        for row in (high, low)
    )
    return paired_interval(ahead, behind) if len(ahead) == len(behind) == len(seeds) else None


def _obstacle(high: Row, low: Row, split: str, seeds: Sequence[int]) -> str:
    """The reason why a difference allows no verdict; empty where there is none."""
    if len(seeds) < 2:
        return "one seed"
    for row in (high, low):
        if row["scores"][split]["accuracy"]["mean"] <= row["baseline"][split]["accuracy"]:
            return f"{row['attention']} is not above the frequency baseline"
    return ""


def _verdict(
    interval: tuple[float, float] | None, obstacle: str, least: float, strict: bool
) -> str:
    if obstacle or interval is None:
        return f"none: {obstacle or 'no scores by sequence'}"
    low, high = interval
    if low > least or (low == least and not strict):
        return "holds"
    if high < least or (high == least and strict):
        return "does not hold"
    return "undecided"
