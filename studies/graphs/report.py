"""Tables and verdicts of ``python -m studies.graphs``, made from its parts by rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from performers.benchmark.table import nbytes, seconds
from studies.graphs.models import ATTENTIONS, EXACT, NODE_MODELS, NOTHING, SAGE
from studies.pages import ABSENT, Table
from studies.parts import Part

Values = Mapping[str, Sequence[Part]]
"""The parts of all seeds by model."""

BATCH_TOLERANCE = 1e-5
"""Largest change of a prediction that counts as rounding, in units of the target."""
_LEAST_SEEDS = 3
_NOT_MEASURED = "not measured"


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """A table for each section and the verdicts; what is not measured is there and says so."""
    groups: dict[str, dict[str, Part]] = {"molecules": {}, "debian": {}, "scaling": {}}
    for name, part in parts.items():
        section, rest = name.split(", ", 1)
        groups[section][rest] = part
    molecules = _by_model(groups["molecules"], ATTENTIONS)
    packages = _by_model(groups["debian"], NODE_MODELS)
    verdicts = [
        *comparisons("molecules", molecules, "test_mae", NOTHING, lower=True),
        *batch_verdicts(molecules),
        *comparisons("packages", packages, "test", SAGE, lower=False),
        *scaling_verdicts(groups["scaling"]),
    ]
    return {
        "molecules": _accuracy(molecules, "test_mae", NOTHING, "test MAE", lower=True),
        "batches": _batches(molecules),
        "debian": _accuracy(packages, "test", SAGE, "test accuracy", lower=False),
        "scaling": _scaling(groups["scaling"]),
        "verdicts": Table(("question", "answer"), verdicts, names=2),
    }


def rows_of_scaling(parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """A row for each number of nodes and attention, as figures take them."""
    return [
        {"nodes": _nodes(name), "attention": attention, "seconds": time}
        | {"peak_bytes": part["nbytes"][attention]}
        for name, part in parts.items()
        if name.startswith("scaling, ")
        for attention, time in part["seconds"].items()
    ]


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
            values = [part[key] for part in parts]
            change = _signed(fmean(values) - fmean(base), lower)
            answer = f"{verdict(values, base, lower=lower)} ({change})"
        found.append((f"{noun}: {name} against {reference}", answer))
    return found


def batch_verdicts(models: Values) -> list[tuple[str, str]]:
    """Attentions whose predictions depend on the size of the batch."""
    found = []
    for name, parts in _with_corrected(models).items():
        largest = max(part["largest"] for part in parts)
        said = "yes" if largest > BATCH_TOLERANCE else "no, to rounding"
        question = f"molecules: does a prediction of {name} depend on its batch?"
        alone, batched = (
            fmean(part[key] for part in parts) for key in ("mae_alone", "mae_batched")
        )
        answer = (
            f"{said} (largest change {largest:.1e}; MAE {alone:.3f} alone, {batched:.3f} batched)"
        )
        found.append((question, answer))
    return found


def scaling_verdicts(parts: Mapping[str, Part]) -> list[tuple[str, str]]:
    """The fewest nodes from which on each attention takes less time than exact attention."""
    both = {_nodes(name): x["seconds"] for name, x in parts.items() if EXACT in x["seconds"]}
    if not both:
        return []
    names = [name for name in both[max(both)] if name != EXACT]
    found = []
    for name in names:
        slower = [nodes for nodes, times in both.items() if times[name] >= times[EXACT]]
        later = [nodes for nodes in both if nodes > max(slower, default=0)]
        ratio = both[max(both)][EXACT] / both[max(both)][name]
        said = f"from {min(later):,} nodes" if later else f"not up to {max(both):,} nodes"
        answer = f"{said}; {ratio:.2g} times as fast with {max(both):,}"
        found.append((f"time: is {name} faster than exact attention?", answer))
    return found


def _by_model(group: Mapping[str, Part], names: Iterable[str]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {name: [] for name in names}
    for name, part in group.items():
        found[name.rsplit(", seed ", 1)[0]].append(part)
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
            change = fmean(values) - fmean(base)
            compared = (_signed(change, lower), verdict(values, base, lower=lower))
        rows.append(
            (
                name,
                f"{parts[0]['parameters']:,}",
                str(len(parts)),
                _shown(fmean(values), lower),
                _shown(stdev(values), lower) if len(values) > 1 else ABSENT,
                *compared,
                f"{fmean(part['cpu_seconds'] for part in parts):.0f}",
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
    rows = [
        (
            name,
            *(f"{fmean(part[key] for part in parts):.4f}" for key in ("mae_alone", "mae_batched")),
            f"{fmean(part['median'] for part in parts):.1e}",
            f"{max(part['largest'] for part in parts):.1e}",
        )
        for name, parts in _with_corrected(models).items()
    ]
    columns = ("attention", "MAE, alone", "MAE, batches of 64", "median change", "largest change")
    return Table(columns, rows)


def _scaling(group: Mapping[str, Part]) -> Table:
    names = list(dict.fromkeys(name for part in group.values() for name in part["seconds"]))
    rows: list[tuple[str, ...]] = [] if group else [(_NOT_MEASURED,)]
    for name, part in group.items():
        cells = []
        for attention in names:
            if attention in part["seconds"]:
                time, memory = part["seconds"][attention], part["nbytes"][attention]
                cells.append(f"{seconds(time)}; {nbytes(memory)}")
            else:
                cells.append(ABSENT)
        rows.append((f"{_nodes(name):,}", *cells))
    return Table(("nodes", *names), rows)


def _nodes(name: str) -> int:
    return int(name.split(" ")[-2])


def _shown(value: float, error: bool) -> str:
    return f"{value:.3f}" if error else f"{100 * value:.1f}%"


def _signed(value: float, error: bool) -> str:
    return f"{value:+.3f}" if error else f"{100 * value:+.1f} points"
