"""Tables, verdicts and the figure, from the parts that are done."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from performers.app.figures import PALETTE, add_legend, new_figure, styled
from studies.pages import ABSENT, Table, digits
from studies.parts import Part
from studies.sparse.attentions import (
    ALL,
    BY_CONTENT,
    EXACT,
    LOCAL,
    PATTERNS,
    PERFORMERS,
    SOFTMAX,
)
from studies.sparse.pretrained import FITTED
from studies.sparse.tasks import TASKS
from studies.sparse.times import PLAIN
from studies.sparse.training import SOLVED

SPARSE = (*PATTERNS, *BY_CONTENT)
# Exponents of an error that falls as 1/m, within sampling error, and of one that hardly falls.
_AS_ONE_OVER_M, _HARDLY = -0.9, -0.5
_LINE_STYLES = ("-", "--", ":")
Parts = Mapping[str, Part]


def tables(parts: Parts) -> dict[str, Table]:
    """The tables of the parts that are done, and the verdicts on them."""
    made = {
        "times": _times(parts.get("times", {})),
        "reach": _reach(parts),
        **{task: _accuracies(parts, task) for task in TASKS},
        "pretrained": _pretrained(parts),
        "errors": _errors(parts),
        "steps": _steps(parts),
        "verdicts": _verdicts(parts),
    }
    return {name: table for name, table in made.items() if table.rows}


def ratios(times: Part, name: str, kind: str) -> float:
    """Speed relative to exact attention, the median of the rounds."""
    pairs = zip(times[EXACT][kind], times[name][kind], strict=True)
    return statistics.median(exact / own for exact, own in pairs)


def _times(times: Part) -> Table:
    kinds = ("forward", "both", "processor")
    rows = [
        (
            name,
            *(f"{1000 * statistics.median(times[name][kind]):.0f}" for kind in kinds[:2]),
            *(f"{ratios(times, name, kind):.2f}" for kind in kinds),
        )
        for name in (*ALL, PLAIN)
        if name in times
    ]
    both = "forward and backward"
    columns = ("forward, ms", f"{both}, ms", "forward", both, "processor time")
    return Table(("attention", *columns), rows)


def _reach(parts: Parts) -> Table:
    rows = []
    for name, part in _named(parts, "reach"):
        layers = (f"{statistics.mean(part[kind]):g}" for kind in ("layers", "most"))
        rows.append((name, *layers, *(f"{part[kind]:.1f}" for kind in ("long", "short"))))
    columns = ("layers", "for 99% of pairs", "keys, encoder", "keys, training")
    return Table(("attention", *columns), rows)


def accuracies(parts: Parts, task: str, name: str) -> dict[int, list[float]]:
    """Accuracies of an attention by depth, an entry a seed."""
    found: dict[int, list[float]] = {}
    for key, part in parts.items():
        if key.startswith(f"{task}, {name}, depth "):
            depth = int(key.split()[-3].rstrip(","))
            found.setdefault(depth, []).append(part["accuracy"])
    return dict(sorted(found.items()))


def solving_depth(parts: Parts, task: str, name: str) -> float:
    """The least depth whose mean accuracy solves a task; infinite where there is none."""
    found = accuracies(parts, task, name)
    solved = [depth for depth, values in found.items() if statistics.mean(values) >= SOLVED]
    return min(solved, default=math.inf) if found else math.nan


def _accuracies(parts: Parts, task: str) -> Table:
    found = {name: accuracies(parts, task, name) for name in ALL}
    depths = sorted({depth for one in found.values() for depth in one})
    rows = [
        (
            name,
            *(_spread(one[depth]) if depth in one else ABSENT for depth in depths),
            _depth(solving_depth(parts, task, name)),
        )
        for name, one in found.items()
        if one
    ]
    columns = [f"depth {depth}" for depth in depths]
    return Table(("attention", *columns, f"least depth with {SOLVED:.2f}"), rows)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)"


def _depth(depth: float) -> str:
    return "none" if math.isinf(depth) else f"{depth:g}"


def _pretrained(parts: Parts) -> Table:
    names = list(dict.fromkeys(name for kind in _MODELS for name, _ in _named(parts, kind)))
    rows = []
    for name in names:
        cells = []
        for kind, metric in (("encoder", "cosine"), ("decoder", "cosine"), ("decoder", _LOSS)):
            value = parts.get(f"{kind}, {name}", {}).get(metric)
            cells.append(ABSENT if value is None else digits(value))
        rows.append((name, *cells))
    if rows:
        own = next((part["original"] for _, part in _named(parts, "decoder")), None)
        rows.insert(0, ("exact", "1", "1" if own else ABSENT, digits(own)))
    columns = ("encoder, cosine", "decoder, cosine", "decoder, perplexity")
    return Table(("attention", *columns), rows).filled() if rows else Table(columns, [])


_MODELS, _LOSS = ("encoder", "decoder"), "perplexity"


def _errors(parts: Parts) -> Table:
    found = dict(_named(parts, "errors"))
    counts = sorted({key for one in found.values() for key in one}, key=int)
    rows = [
        (name, *(digits(one.get(key)) for key in counts), f"{slope(one):.2f}")
        for name, one in found.items()
    ]
    return Table(("attention", *(f"{int(key):,}" for key in counts), "exponent"), rows)


def slope(errors: Mapping[str, float]) -> float:
    """The exponent of a power law through the errors, by least squares of logarithms."""
    pairs = [(math.log(int(key)), math.log(x)) for key, x in errors.items() if x > 0]
    across, up = zip(*pairs, strict=True)
    return statistics.linear_regression(across, up).slope


def _steps(parts: Parts) -> Table:
    found = dict(_named(parts, "step"))
    lengths = sorted({key for one in found.values() for key in one}, key=int)
    rows = []
    for name, one in found.items():
        cells = (
            f"{one[key]['seconds']:.2f} s, {one[key]['nbytes'] / 2**20:,.0f} MiB"
            if key in one
            else ABSENT
            for key in lengths
        )
        rows.append((name, *cells))
    return Table(("attention", *(f"{int(key):,} tokens" for key in lengths)), rows)


def _named(parts: Parts, kind: str) -> list[tuple[str, Part]]:
    prefix = f"{kind}, "
    return [(key.removeprefix(prefix), x) for key, x in parts.items() if key.startswith(prefix)]


def _verdicts(parts: Parts) -> Table:
    claims: tuple[tuple[str, Callable[[Parts], tuple[str, str] | None]], ...] = (
        ("Sparse attention needs special kernels", _kernels),
        ("Sparse attention has no guarantee", _guarantee),
        ("Sparse attention stacks layers to compensate: reach", _stacking),
        *(
            (f"Sparse attention stacks layers to compensate: {task}", _solving(task))
            for task in TASKS
        ),
        *(
            (f"Sparse attention cannot take over a pretrained {kind}", _taking_over(kind))
            for kind in _MODELS
        ),
    )
    rows = [(claim, *found) for claim, rule in claims if (found := rule(parts)) is not None]
    return Table(("claim", "verdict", "measured"), rows, names=3)


def _kernels(parts: Parts) -> tuple[str, str] | None:
    if "times" not in parts:
        return None
    own = {name: ratios(parts["times"], name, "both") for name in SPARSE}
    fast = [name for name, ratio in own.items() if ratio > 1]
    verdict = "refuted" if len(fast) == len(own) else "holds in part" if fast else "holds"
    shown = ", ".join(f"{name} {ratio:.1f}" for name, ratio in own.items())
    plain = ratios(parts["times"], PLAIN, "both")
    return verdict, (
        f"in plain torch, forward and backward, times as fast as exact attention: {shown}; "
        f"Performer {plain:.1f} in plain torch, {ratios(parts['times'], SOFTMAX, 'both'):.1f} "
        "with its kernels"
    )


def _guarantee(parts: Parts) -> tuple[str, str] | None:
    found = dict(_named(parts, "errors"))
    if SOFTMAX not in found or LOCAL not in found:
        return None
    patterns = {name: found[name] for name in PATTERNS if name in found}
    ours = {name: found[name] for name in (SOFTMAX, FITTED) if name in found}
    budgets = list(found[LOCAL])
    better = sum(found[SOFTMAX][key] < min(x[key] for x in patterns.values()) for key in budgets)
    exponents = {name: slope(one) for name, one in (ours | patterns).items()}
    steepest = min(exponents[name] for name in ours)
    verdict = "holds" if max(exponents[name] for name in ours) <= _AS_ONE_OVER_M else "in part"
    if steepest > _HARDLY:
        verdict = "not seen at these sizes"
    shown = ", ".join(f"{name} {x:.2f}" for name, x in exponents.items())
    return verdict, (
        f"exponents of squared errors on pretrained heads (1/m is -1): {shown}; with as many "
        f"features as keys, features alone are nearer than the best pattern at {better} of "
        f"{len(budgets)} numbers of keys"
    )


def _stacking(parts: Parts) -> tuple[str, str] | None:
    found = {name: statistics.mean(part["layers"]) for name, part in _named(parts, "reach")}
    sparse = {name: found[name] for name in SPARSE if name in found}
    if not sparse:
        return None
    ours = max(found[name] for name in PERFORMERS if name in found)
    more = [name for name, layers in sparse.items() if layers > ours]
    verdict = "holds" if len(more) == len(sparse) else "holds in part" if more else "refuted"
    shown = ", ".join(f"{name} {layers:.3g}" for name, layers in sparse.items())
    return verdict, f"layers until every token reaches all later ones: Performers {ours:g}; {shown}"


def _solving(task: str) -> Callable[[Parts], tuple[str, str] | None]:
    def rule(parts: Parts) -> tuple[str, str] | None:
        found = {name: solving_depth(parts, task, name) for name in ALL}
        found = {name: depth for name, depth in found.items() if not math.isnan(depth)}
        ours = [found[name] for name in PERFORMERS if name in found]
        sparse = [found[name] for name in SPARSE if name in found]
        if not ours or not sparse:
            return None
        if math.isinf(min(ours + sparse)):
            verdict = "undecided: none solves it"
        elif max(ours) < min(sparse):
            verdict = "holds"
        elif min(ours) < min(sparse):
            verdict = "holds for the best Performer"
        elif min(ours) == min(sparse):
            verdict = "undecided: the best of both are even"
        else:
            verdict = "the reverse: the best sparse attention needs fewer"
        shown = ", ".join(f"{name} {_depth(depth)}" for name, depth in found.items())
        return verdict, f"least depth measured that solves it: {shown}"

    return rule


def _taking_over(kind: str) -> Callable[[Parts], tuple[str, str] | None]:
    def rule(parts: Parts) -> tuple[str, str] | None:
        found = dict(_named(parts, kind))
        sparse = [name for name in PATTERNS if name in found]
        ours = [name for name in found if name not in PATTERNS]
        if not sparse or not ours:
            return None
        if any(x["perplexity"] is not None for x in found.values()):
            metric, word, sign = "perplexity", "lowest perplexity", 1
        else:
            metric, word, sign = "cosine", "highest cosine", -1

        def best(names: Iterable[str]) -> tuple[str, float]:
            name = min(names, key=lambda name: sign * found[name][metric])
            return name, found[name][metric]

        (own, own_value), (other, other_value) = best(ours), best(sparse)
        ahead = sign * own_value < sign * other_value
        plain = SOFTMAX in found and sign * found[SOFTMAX][metric] < sign * other_value
        verdict = "holds, for features alone too" if plain else "holds" if ahead else "the reverse"
        text = (
            f"{word}, weights untouched: {own} {digits(own_value)}, {other} {digits(other_value)}"
        )
        if SOFTMAX in found:
            text += f" ({SOFTMAX} alone {digits(found[SOFTMAX][metric])})"
        return verdict, text

    return rule


@styled
def draw_steps(parts: Parts) -> Figure:
    """Processor time and peak memory of a training step against its length."""
    figure = new_figure((9.6, 4.6))
    axes = figure.subplots(1, 2)
    lines: list[tuple[str, Any]] = []
    for number, (name, one) in enumerate(_named(parts, "step")):
        lengths = [int(key) for key in one]
        style = {
            "color": PALETTE[number % len(PALETTE)],
            "linestyle": _LINE_STYLES[number // len(PALETTE)],
            "marker": "o",
            "markersize": 3,
        }
        (line,) = axes[0].plot(lengths, [x["seconds"] for x in one.values()], **style)
        axes[1].plot(lengths, [x["nbytes"] / 2**20 for x in one.values()], **style)
        lines.append((name, line))
    for axis, label in zip(
        axes, ("processor seconds of a step", "peak MiB of a step"), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
    add_legend(figure, lines, "outside lower center", 3)
    return figure
