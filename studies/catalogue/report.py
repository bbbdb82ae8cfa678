"""Tables of ``python -m studies.catalogue``."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from studies.pages import Table
from studies.parts import Part, by_seed, section


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """A table for each of the study's four questions, as far as its parts are measured."""
    made = {
        "quality": _quality,
        "recommendation": _recommendation,
        "words": _words,
        "million": _million,
    }
    return {name: make(group) for name, make in made.items() if (group := section(parts, name))}


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _quality(group: Mapping[str, Part]) -> Table:
    names = dict.fromkeys(name for part in group.values() for name in part["chi_squared"])
    rows = [("inverse temperature", *(f"{part['scale']:.1f}" for part in group.values()))]
    for name in names:
        values = [part["chi_squared"].get(name) for part in group.values()]
        rows.append((name, *("" if x is None else " / ".join(map(_number, x)) for x in values)))
    return Table(("sampler", *group), rows)


def _recommendation(group: Mapping[str, Part]) -> Table:
    rows, full = [], None
    for name, parts in by_seed(group).items():
        ndcg, hits, seconds = (
            fmean(part[key] for part in parts) for key in ("ndcg", "hits", "cpu_seconds")
        )
        full = ndcg if name == "full softmax" else full
        share = f"{ndcg / full:.2f}" if full else ""
        rows.append((name, str(len(parts)), f"{ndcg:.4f}", share, f"{hits:.4f}", f"{seconds:.0f}"))
    return Table(("loss", "seeds", "NDCG@10", "/ full", "HR@10", "training, s"), rows)


def _words(group: Mapping[str, Part]) -> Table:
    full = group.get("full softmax")
    return Table.of(
        {
            "loss": name,
            "perplexity": f"{part['perplexity']:.1f}",
            "to full": f"{part['perplexity'] / full['perplexity'] - 1:+.1%}" if full else "",
            "output layer, ms": f"{1e3 * part['output_seconds']:.0f}",
            "full / this": f"{full['output_seconds'] / part['output_seconds']:.1f}" if full else "",
            "step, ms": f"{1e3 * part['step_seconds']:.0f}",
        }
        for name, part in group.items()
    )


def _million(group: Mapping[str, Part]) -> Table:
    parts = group.values()
    rows = [
        (
            name,
            *(
                f"{_number(x['seconds'][name])} s; {_number(x['mebibytes'][name])} MiB"
                for x in parts
            ),
        )
        for name in next(iter(parts))["seconds"]
    ]
    chi_squared = [" / ".join(map(_number, part["chi_squared"])) for part in parts]
    return Table(("", *group), [*rows, ("chi-squared, median / mean", *chi_squared)])
