"""Means over seeds, and verdicts on the paper's claims, as JSON holds them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

METRICS = ("accuracy", "perplexity")

Row = Mapping[str, Any]
"""One attention under one objective: ``objective``, ``attention``, ``parameters``, ``seconds`` (a
spread), ``scores`` (split to metric to spread) and ``baseline`` (split to metric to the number that
the unigram baseline has on the same residues)."""


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
    """A row for every objective and attention that has results, masked before causal.

    Args:
        results: Contents of ``result.json``.
        attentions: Attentions in the order of the rows.
    """
    grouped: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for result in sorted(results, key=lambda result: result["seed"]):
        grouped[result["objective"], result["attention"]][result["seed"]] = result
    rows: list[Row] = []
    for objective, attention in ((x, y) for x in ("mlm", "clm") for y in attentions):
        runs = grouped.get((objective, attention))
        if not runs:
            continue
        first = next(iter(runs.values()))
        splits = list(first["scores"])
        rows.append(
            {
                "objective": objective,
                "attention": attention,
                "parameters": first["parameters"],
                "seconds": spread({seed: run["seconds"] for seed, run in runs.items()}),
                "scores": {
                    split: {
                        metric: spread({s: run["scores"][split][metric] for s, run in runs.items()})
                        for metric in METRICS
                    }
                    for split in splits
                },
                "baseline": {
                    split: {m: first["scores"][split][f"baseline_{m}"] for m in METRICS}
                    for split in splits
                },
            }
        )
    return rows


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
        should be at least ``least``, or more (``strict``), and the ``verdict``; a difference within
        one standard deviation of ``least`` decides nothing.
    """
    by_name = {(row["objective"], row["attention"]): row["scores"] for row in rows}
    found = []
    for objective, word in (("mlm", "masked"), ("clm", "causal")):
        for text, above, below, split, least, strict in _CLAIMS:
            high, low = by_name.get((objective, above)), by_name.get((objective, below))
            if high is None or low is None:
                continue
            one, other = (scores[split]["accuracy"]["values"] for scores in (high, low))
            both = sorted(one.keys() & other.keys())
            if both:
                difference = spread({seed: 100 * (one[seed] - other[seed]) for seed in both})
                over, sd = difference["mean"] - least, difference["sd"]
                if sd is not None and abs(over) < sd:
                    verdict = "undecided"
                else:
                    verdict = "holds" if over > 0 or (over == 0 and not strict) else "does not hold"
                found.append(
                    {
                        "claim": f"{word}: {text}",
                        "difference": difference,
                        "least": least,
                        "strict": strict,
                        "verdict": verdict,
                    }
                )
    return found
