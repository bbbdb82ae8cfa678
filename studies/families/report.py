"""Tables of the study."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from studies.pages import Table
from studies.parts import Part, by_seed, section


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """Tables of the parts that are done."""
    ceilings = section(parts, "ceiling")
    made: dict[str, Callable[[Mapping[str, Part]], Table]] = {
        "ceiling": _ceiling,
        "copying": _copying,
        "families": partial(_families, ceilings=ceilings),
        "included": _included,
        "contexts": _contexts,
    }
    return {name: make(group) for name, make in made.items() if (group := section(parts, name))}


def _ceiling(parts: Mapping[str, Part]) -> Table:
    rows = (
        {
            "families": name,
            "relatives": relatives,
            "vote": percent(found["vote"]),
            "profile": percent(found["accuracy"]),
            "perplexity": f"{found['perplexity']:.2f}",
            "aligned": percent(found["aligned"]),
            "residues": f"{part['tokens']:,}",
        }
        for name, part in parts.items()
        for relatives, found in part["relatives"].items()
    )
    return Table.of(rows, names=2)


def _copying(parts: Mapping[str, Part]) -> Table:
    """Accuracy of each attention by training step, and without the relative."""
    steps = list(dict.fromkeys(int(x["step"]) for part in parts.values() for x in part["curve"]))
    rows = []
    for name, starts in by_seed(parts).items():
        curves = [{int(x["step"]): x["accuracy"] for x in part["curve"]} for part in starts]
        seconds = statistics.mean(part["curve"][-1]["cpu_seconds"] for part in starts)
        rows.append(
            {
                "attention": name,
                "seeds": str(len(starts)),
                **{f"step {x:,}": spread([y[x] for y in curves if x in y]) for x in steps},
                "no relative": spread([part["alone"]["accuracy"] for part in starts]),
                "CPU seconds": f"{seconds:.0f}",
            }
        )
    return Table.of(rows)


def _families(parts: Mapping[str, Part], ceilings: Mapping[str, Part]) -> Table:
    """Accuracy and perplexity by number of relatives, beside the profile of the ceiling."""
    lines: list[tuple[str, str, Sequence[Mapping[str, Any]]]] = []
    for source in next(iter(parts.values()))["scores"]:
        lines.append((source, "profile of alignments", [ceilings[source]["relatives"]]))
        lines += [
            (source, name, [part["scores"][source] for part in starts])
            for name, starts in by_seed(parts).items()
        ]
    counts = list(dict.fromkeys(count for *_, found in lines for count in found[0]))
    rows = []
    for source, name, starts in lines:
        perplexities = {
            x: statistics.geometric_mean(found[x]["perplexity"] for found in starts) for x in counts
        }
        rows.append(
            {
                "families": source,
                "predicted by": name,
                "seeds": str(len(starts)),
                **{f"accuracy, {x}": spread([y[x]["accuracy"] for y in starts]) for x in counts},
                **{f"perplexity, {count}": f"{x:.1f}" for count, x in perplexities.items()},
            }
        )
    return Table.of(rows, names=2)


def _included(parts: Mapping[str, Part]) -> Table:
    """The model and the profile on each set of proteins, by number of relatives."""
    rows = []
    for part in parts.values():
        for relatives, profile in part["relatives"].items():
            found = {
                "model": part["model"][relatives],
                "model, aligned": part["aligned"][relatives],
                "profile": profile,
            }
            rows.append(
                {
                    "proteins": f"{part['proteins']:,}",
                    "families": f"{part['families']:,}",
                    "relatives": relatives,
                    **{name: percent(x["accuracy"]) for name, x in found.items()},
                    **{
                        f"{name}, perplexity": f"{x['perplexity']:.2f}" for name, x in found.items()
                    },
                    "residues": f"{part['tokens']:,}",
                }
            )
    return Table.of(rows)


def _contexts(parts: Mapping[str, Part]) -> Table:
    return Table.of(
        {
            "attention": part["attention"],
            "tokens": f"{part['tokens']:,}",
            "members": f"{part['members']:,}",
            "CPU seconds": f"{part['cpu_seconds']:.1f}",
            "MiB": f"{part['mebibytes']:,.0f}",
        }
        for part in parts.values()
    )


def percent(value: Any) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}%"


def spread(values: Sequence[float]) -> str:
    """The mean in percent, and the standard deviation if there are several values."""
    if not values:
        return "–"
    mean = percent(statistics.mean(values))
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean
