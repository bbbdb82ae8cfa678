"""Tables of ``python -m studies.catalogue``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from studies.pages import Table
from studies.parts import Part


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """A table for each of the study's four questions, as far as its parts are measured."""
    groups: dict[str, dict[str, Part]] = {}
    for name, part in parts.items():
        section, rest = name.split(", ", 1)
        groups.setdefault(section, {})[rest] = part
    made = {
        "quality": _quality,
        "recommendation": _recommendation,
        "words": _words,
        "million": _million,
    }
    return {section: made[section](group) for section, group in groups.items()}


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _quality(group: Mapping[str, Part]) -> Table:
    names = dict.fromkeys(name for part in group.values() for name in part["chi_squared"])
    rows = [("inverse temperature", *(f"{part['scale']:.1f}" for part in group.values()))]
    for name in names:
        values = [part["chi_squared"].get(name) for part in group.values()]
        rows.append((name, *("" if x is None else " / ".join(map(number, x)) for x in values)))
    return Table(("sampler", *group), rows)


def _recommendation(group: Mapping[str, Part]) -> Table:
    by_loss: dict[str, list[Part]] = {}
    for name, part in group.items():
        by_loss.setdefault(name.split(", seed")[0], []).append(part)

    def mean(parts: Sequence[Part], key: str) -> float:
        return fmean(part[key] for part in parts)

    full = by_loss.get("full softmax")
    rows = [
        (
            name,
            str(len(parts)),
            f"{mean(parts, 'ndcg'):.4f}",
            f"{mean(parts, 'ndcg') / mean(full, 'ndcg'):.2f}" if full else "",
            f"{mean(parts, 'hits'):.4f}",
            f"{mean(parts, 'cpu_seconds'):.0f}",
        )
        for name, parts in by_loss.items()
    ]
    return Table(("loss", "seeds", "NDCG@10", "/ full", "HR@10", "training, s"), rows)


def _words(group: Mapping[str, Part]) -> Table:
    full = group.get("full softmax")
    rows = [
        (
            name,
            f"{part['perplexity']:.1f}",
            f"{part['perplexity'] / full['perplexity'] - 1:+.1%}" if full else "",
            f"{1e3 * part['output_seconds']:.0f}",
            f"{full['output_seconds'] / part['output_seconds']:.1f}" if full else "",
            f"{1e3 * part['step_seconds']:.0f}",
        )
        for name, part in group.items()
    ]
    columns = ("loss", "perplexity", "to full", "output layer, ms", "full / this", "step, ms")
    return Table(columns, rows)


def _million(group: Mapping[str, Part]) -> Table:
    first = next(iter(group.values()))
    rows = [
        (
            name,
            *(
                f"{number(part['seconds'][name])} s; {number(part['mebibytes'][name])} MiB"
                for part in group.values()
            ),
        )
        for name in first["seconds"]
    ]
    chi_squared = [" / ".join(map(number, part["chi_squared"])) for part in group.values()]
    return Table(("", *group), [*rows, ("chi-squared, median / mean", *chi_squared)])
