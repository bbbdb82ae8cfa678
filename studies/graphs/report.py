"""Tables, verdicts and the figure of ``python -m studies.graphs``, made from its parts by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from performers.app.figures import new_figure, styled
from performers.benchmark.plot import draw_panel, shared_legend
from performers.benchmark.table import nbytes, seconds
from studies.graphs.models import ATTENTIONS, EXACT, NODE_MODELS, NOTHING, SAGE
from studies.pages import ABSENT, Table
from studies.parts import Part, by_seed, section

Values = Mapping[str, Sequence[Part]]
"""The parts of all seeds by model."""

BATCH_TOLERANCE = 1e-5
"""Largest change of a prediction that counts as rounding, in units of the target."""
_LEAST_SEEDS = 3
_NOT_MEASURED = "not measured"


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """A table for each section and the verdicts; what is not measured is there and says so."""
    none: list[Part] = []
    molecules = dict.fromkeys(ATTENTIONS, none) | by_seed(section(parts, "molecules"))
    packages = dict.fromkeys(NODE_MODELS, none) | by_seed(section(parts, "debian"))
    scaling = _by_nodes(parts)
    verdicts = [
        *comparisons("molecules", molecules, "test_mae", NOTHING, lower=True),
        *batch_verdicts(molecules),
        *comparisons("packages", packages, "test", SAGE, lower=False),
        *scaling_verdicts(scaling),
    ]
    return {
        "molecules": _accuracy(molecules, "test_mae", NOTHING, "test MAE", lower=True),
        "batches": _batches(molecules),
        "debian": _accuracy(packages, "test", SAGE, "test accuracy", lower=False),
        "scaling": _scaling(scaling),
        "verdicts": Table(("question", "answer"), verdicts, names=2),
    }


@styled
def scaling_figure(parts: Mapping[str, Part]) -> Figure:
    """A panel of seconds and one of peak memory against nodes, a line for each attention."""
    rows: list[dict[str, Any]] = [
        {"nodes": nodes, "attention": name, "seconds": time, "peak_bytes": part["nbytes"][name]}
        for nodes, part in _by_nodes(parts).items()
        for name, time in part["seconds"].items()
    ]
    names = list(dict.fromkeys(row["attention"] for row in rows))
    figure = new_figure((8.8, 3.9))
    panels = (("seconds", "seconds"), ("peak_bytes", "peak memory"))
    for axes, (column, label) in zip(figure.subplots(1, 2), panels, strict=True):
        draw_panel(axes, rows, "nodes", column, label, "attention", names)
        axes.set_xlabel("nodes")
    shared_legend(figure, 4)
    return figure


def _by_nodes(parts: Mapping[str, Part]) -> dict[int, Part]:
    return {int(name.split(" ")[0]): part for name, part in section(parts, "scaling").items()}


def verdict(values: Sequence[float], reference: Sequence[float], *, lower: bool) -> str:
    """The words "better" or "worse", or that seeds do not tell.

    Better is a model whose worst seed is ahead of the reference's best one; worse the reverse. With
    three seeds each, two equal models are told apart so by chance one time in ten.
    """
    if min(len(values), len(reference)) < _LEAST_SEEDS:
        return "too few seeds to tell"
    sign = -1 if lower else 1
    ours, theirs = ([sign * x for x in group] for group in (values, reference))
    if min(ours) > max(theirs):
        return "better"
    if max(ours) < min(theirs):
        return "worse"
    return "no difference that seeds show"


def comparisons(
    noun: str, models: Values, key: str, reference: str, *, lower: bool
) -> list[tuple[str, str]]:
    """The verdict on each model against a reference, and the mean difference."""
    base = [part[key] for part in models[reference]]
    found = []
    for name, parts in models.items():
        if name == reference:
            continue
        answer = _NOT_MEASURED
        if base and parts:
            change, word = _compared(parts, key, base, lower=lower)
            answer = f"{word} ({change})"
        found.append((f"{noun}: {name} against {reference}", answer))
    return found


def _compared(
    parts: Sequence[Part], key: str, base: Sequence[float], *, lower: bool
) -> tuple[str, str]:
    """The difference of the means, and the verdict."""
    values = [part[key] for part in parts]
    change = fmean(values) - fmean(base)
    shown = f"{change:+.3f}" if lower else f"{100 * change:+.1f} points"
    return shown, verdict(values, base, lower=lower)


def batch_verdicts(models: Values) -> list[tuple[str, str]]:
    """Attentions whose predictions depend on the size of the batch."""
    found = []
    for name, parts in _with_corrected(models).items():
        largest = max(part["largest"] for part in parts)
        said = "yes" if largest > BATCH_TOLERANCE else "no, to rounding"
        alone, batched = (_mean(parts, key) for key in ("mae_alone", "mae_batched"))
        maes = f"MAE {alone:.3f} alone, {batched:.3f} batched"
        question = f"molecules: does a prediction of {name} depend on its batch?"
        found.append((question, f"{said} (largest change {largest:.1e}; {maes})"))
    return found


def scaling_verdicts(parts: Mapping[int, Part]) -> list[tuple[str, str]]:
    """The fewest nodes from which on each attention takes less time than exact attention."""
    both = {nodes: x["seconds"] for nodes, x in parts.items() if EXACT in x["seconds"]}
    if not both:
        return []
    found, most = [], max(both)
    for name in (x for x in both[most] if x != EXACT):
        slower = [nodes for nodes, times in both.items() if times[name] >= times[EXACT]]
        later = [nodes for nodes in both if nodes > max(slower, default=0)]
        said = f"from {min(later):,} nodes" if later else f"not up to {most:,} nodes"
        answer = f"{said}; {both[most][EXACT] / both[most][name]:.2g} times as fast with {most:,}"
        found.append((f"time: is {name} faster than exact attention?", answer))
    return found


def _accuracy(models: Values, key: str, reference: str, heading: str, *, lower: bool) -> Table:
    base = [part[key] for part in models[reference]]
    rows = []
    for name, parts in models.items():
        if not parts:
            rows.append((name, "", "0", _NOT_MEASURED, "", "", "", ""))
            continue
        values = [part[key] for part in parts]
        compared = ("", "")
        if base and name != reference:
            compared = _compared(parts, key, base, lower=lower)
        rows.append(
            (
                name,
                f"{parts[0]['parameters']:,}",
                str(len(parts)),
                _shown(fmean(values), lower),
                _shown(stdev(values), lower) if len(values) > 1 else ABSENT,
                *compared,
                f"{_mean(parts, 'cpu_seconds'):.0f}",
            )
        )
    columns = (
        "model", "parameters", "seeds", heading, "standard deviation", f"to {reference}", "verdict",
        "training, s",
    )  # fmt: skip
    return Table(columns, rows)


def _with_corrected(models: Values) -> dict[str, list[Part]]:
    found = {}
    for name, parts in models.items():
        if not parts:
            continue
        found[name] = [part["by_batch"] for part in parts]
        if all("corrected" in part for part in parts):
            found[f"{name}, replaced after training"] = [part["corrected"] for part in parts]
    return found


def _batches(models: Values) -> Table:
    return Table.of(
        {
            "attention": name,
            "MAE, alone": f"{_mean(parts, 'mae_alone'):.4f}",
            "MAE, batches of 64": f"{_mean(parts, 'mae_batched'):.4f}",
            "median change": f"{_mean(parts, 'median'):.1e}",
            "largest change": f"{max(part['largest'] for part in parts):.1e}",
        }
        for name, parts in _with_corrected(models).items()
    )


def _scaling(parts: Mapping[int, Part]) -> Table:
    if not parts:
        return Table(("nodes",), [(_NOT_MEASURED,)])
    return Table.of(
        {
            "nodes": f"{nodes:,}",
            **{
                name: f"{seconds(time)}; {nbytes(part['nbytes'][name])}"
                for name, time in part["seconds"].items()
            },
        }
        for nodes, part in parts.items()
    )


def _mean(parts: Sequence[Part], key: str) -> float:
    return fmean(part[key] for part in parts)


def _shown(value: float, error: bool) -> str:
    return f"{value:.3f}" if error else f"{100 * value:.1f}%"
