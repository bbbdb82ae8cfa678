"""Tables of the study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from studies.pages import Table
from studies.parts import Part, by_seed, section


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """Tables of the parts that are done."""
    ceilings = section(parts, "ceiling")
    made = {"ceiling": ceiling_table(ceilings)}
    if copied := section(parts, "copying"):
        made["copying"] = copying_table(copied)
    if trained := section(parts, "families"):
        made["families"] = families_table(trained, ceilings)
    if scored := section(parts, "included"):
        made["included"] = included_table(scored)
    if read := section(parts, "contexts"):
        made["contexts"] = contexts_table(read)
    return made


def ceiling_table(parts: Mapping[str, Part]) -> Table:
    """A line for each set of proteins and number of relatives."""
    columns = ("families", "relatives", "vote", "profile", "perplexity", "aligned", "residues")
    rows = [
        (
            name,
            relatives,
            *(percent(found[key]) for key in ("vote", "accuracy")),
            f"{found['perplexity']:.2f}",
            percent(found["aligned"]),
            f"{part['tokens']:,}",
        )
        for name, part in parts.items()
        for relatives, found in part["relatives"].items()
    ]
    return Table(columns, rows, names=2)


def copying_table(parts: Mapping[str, Part]) -> Table:
    """A line for each attention: accuracy by training step, and without the relative."""
    steps = list(dict.fromkeys(int(x["step"]) for part in parts.values() for x in part["curve"]))
    rows = []
    for name, starts in by_seed(parts).items():
        curves = [{int(x["step"]): x["accuracy"] for x in part["curve"]} for part in starts]
        seconds = statistics.mean(part["curve"][-1]["cpu_seconds"] for part in starts)
        rows.append(
            (
                name,
                str(len(starts)),
                *(spread([curve[step] for curve in curves if step in curve]) for step in steps),
                spread([part["alone"]["accuracy"] for part in starts]),
                f"{seconds:.0f}",
            )
        )
    columns = (*("attention", "seeds"), *(f"step {step:,}" for step in steps))
    return Table((*columns, "no relative", "CPU seconds"), rows)


def families_table(parts: Mapping[str, Part], ceilings: Mapping[str, Part]) -> Table:
    """Accuracy and perplexity by number of relatives, beside the profile of the ceiling."""
    lines: list[tuple[str, str, Sequence[Mapping[str, Any]]]] = []
    for source in next(iter(parts.values()))["scores"]:
        lines.append((source, "profile of alignments", [ceilings[source]["relatives"]]))
        lines += [
            (source, name, [part["scores"][source] for part in starts])
            for name, starts in by_seed(parts).items()
        ]
    counts = list(dict.fromkeys(count for *_, found in lines for count in found[0]))
    rows = [
        (
            *names,
            str(len(starts)),
            *(spread([found[count]["accuracy"] for found in starts]) for count in counts),
            *(
                f"{statistics.geometric_mean(found[count]['perplexity'] for found in starts):.1f}"
                for count in counts
            ),
        )
        for *names, starts in lines
    ]
    columns = (
        *("families", "predicted by", "seeds"),
        *(f"accuracy, {count}" for count in counts),
        *(f"perplexity, {count}" for count in counts),
    )
    return Table(columns, rows, names=2)


def included_table(parts: Mapping[str, Part]) -> Table:
    """A line for each set of proteins and number of relatives: the model and the profile."""
    columns = ("proteins", "families", "relatives", "model", "profile")
    rows = [
        (
            f"{part['proteins']:,}",
            f"{part['families']:,}",
            relatives,
            percent(found["accuracy"]),
            percent(profile["accuracy"]),
            f"{found['perplexity']:.2f}",
            f"{profile['perplexity']:.2f}",
            f"{part['tokens']:,}",
        )
        for part in parts.values()
        for relatives, profile in part["relatives"].items()
        for found in [part["model"][relatives]]
    ]
    return Table((*columns, "model, perplexity", "profile, perplexity", "residues"), rows)


def contexts_table(parts: Mapping[str, Part]) -> Table:
    """A line for each attention and length of a row."""
    columns = ("attention", "tokens", "members", "CPU seconds", "MiB")
    rows = [
        (
            part["attention"],
            f"{part['tokens']:,}",
            f"{part['members']:,}",
            f"{part['cpu_seconds']:.1f}",
            f"{part['mebibytes']:,.0f}",
        )
        for part in parts.values()
    ]
    return Table(columns, rows)


def percent(value: Any) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}%"


def spread(values: Sequence[float]) -> str:
    """The mean in percent, and the standard deviation if there are several values."""
    if not values:
        return "–"
    mean = percent(statistics.mean(values))
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean
