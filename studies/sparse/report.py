"""Tables, verdicts and the figure, from the parts that are done."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from performers.app.figures import PALETTE, add_legend, new_figure, styled
from studies.pages import ABSENT, Table, digits
from studies.parts import Part, by_seed, section
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
_MODELS = ("encoder", "decoder")
Parts = Mapping[str, Part]
Verdict = tuple[str, str] | None
"""A verdict and the numbers it follows from; None where they are not measured."""


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
    both = "forward and backward"
    return Table.of(
        {
            "attention": name,
            "forward, ms": f"{1000 * statistics.median(times[name]['forward']):.0f}",
            f"{both}, ms": f"{1000 * statistics.median(times[name]['both']):.0f}",
            "forward": f"{ratios(times, name, 'forward'):.2f}",
            both: f"{ratios(times, name, 'both'):.2f}",
            "processor time": f"{ratios(times, name, 'processor'):.2f}",
        }
        for name in (*ALL, PLAIN)
        if name in times
    )


def _reach(parts: Parts) -> Table:
    return Table.of(
        {
            "attention": name,
            "layers": f"{statistics.mean(part['layers']):g}",
            "for 99% of pairs": f"{statistics.mean(part['most']):g}",
            "keys, encoder": f"{part['long']:.1f}",
            "keys, training": f"{part['short']:.1f}",
        }
        for name, part in section(parts, "reach").items()
    )


def accuracies(parts: Parts, task: str, name: str) -> dict[int, list[float]]:
    """Accuracies of an attention by depth, an entry a seed."""
    found = by_seed(section(parts, f"{task}, {name}"))
    depths = {int(depth.removeprefix("depth ")): seeds for depth, seeds in found.items()}
    return {depth: [part["accuracy"] for part in depths[depth]] for depth in sorted(depths)}


def solving_depth(parts: Parts, task: str, name: str) -> float:
    """The least depth whose mean accuracy solves a task; infinite where there is none."""
    found = accuracies(parts, task, name)
    solved = [depth for depth, values in found.items() if statistics.mean(values) >= SOLVED]
    return min(solved, default=math.inf) if found else math.nan


def _accuracies(parts: Parts, task: str) -> Table:
    found = {name: one for name in ALL if (one := accuracies(parts, task, name))}
    depths = sorted({depth for one in found.values() for depth in one})
    return Table.of(
        {
            "attention": name,
            **{f"depth {x}": _spread(one[x]) if x in one else ABSENT for x in depths},
            f"least depth with {SOLVED:.2f}": _depth(solving_depth(parts, task, name)),
        }
        for name, one in found.items()
    )


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)"


def _depth(depth: float) -> str:
    return "none" if math.isinf(depth) else f"{depth:g}"


def _pretrained(parts: Parts) -> Table:
    encoder, decoder = (section(parts, kind) for kind in _MODELS)
    if not encoder and not decoder:
        return Table((), ())
    original = next((part["original"] for part in decoder.values()), None)
    rows = [("exact", {"cosine": 1}, {"cosine": original and 1, "perplexity": original})]
    for name in encoder | decoder:
        rows.append((name, encoder.get(name, {}), decoder.get(name, {})))
    return Table.of(
        {
            "attention": name,
            "encoder, cosine": digits(on_encoder.get("cosine")),
            "decoder, cosine": digits(on_decoder.get("cosine")),
            "decoder, perplexity": digits(on_decoder.get("perplexity")),
        }
        for name, on_encoder, on_decoder in rows
    ).filled()


def _errors(parts: Parts) -> Table:
    found = section(parts, "errors")
    counts = sorted({key for one in found.values() for key in one}, key=int)
    return Table.of(
        {
            "attention": name,
            **{f"{int(key):,}": digits(one.get(key)) for key in counts},
            "exponent": f"{slope(one):.2f}",
        }
        for name, one in found.items()
    )


def slope(errors: Mapping[str, float]) -> float:
    """The exponent of a power law through the errors, by least squares of logarithms."""
    pairs = [(math.log(int(key)), math.log(x)) for key, x in errors.items() if x > 0]
    across, up = zip(*pairs, strict=True)
    return statistics.linear_regression(across, up).slope


def _steps(parts: Parts) -> Table:
    return Table.of(
        {"attention": name}
        | {
            f"{int(length):,} tokens": f"{x['seconds']:.2f} s, {x['nbytes'] / 2**20:,.0f} MiB"
            for length, x in one.items()
        }
        for name, one in section(parts, "step").items()
    )


def _verdicts(parts: Parts) -> Table:
    stacking = "Sparse attention stacks layers to compensate"
    claims = {
        "Sparse attention needs special kernels": _kernels(parts),
        "Sparse attention has no guarantee": _guarantee(parts),
        f"{stacking}: reach": _stacking(parts),
        **{f"{stacking}: {task}": _solving(parts, task) for task in TASKS},
        **{
            f"Sparse attention cannot take over a pretrained {kind}": _taking_over(parts, kind)
            for kind in _MODELS
        },
    }
    rows = [(claim, *found) for claim, found in claims.items() if found is not None]
    return Table(("claim", "verdict", "measured"), rows, names=3)


def _kernels(parts: Parts) -> Verdict:
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


def _guarantee(parts: Parts) -> Verdict:
    found = section(parts, "errors")
    if SOFTMAX not in found or LOCAL not in found:
        return None
    patterns = {name: found[name] for name in PATTERNS if name in found}
    ours = {name: found[name] for name in (SOFTMAX, FITTED) if name in found}
    budgets = list(found[LOCAL])
    better = sum(found[SOFTMAX][key] < min(x[key] for x in patterns.values()) for key in budgets)
    exponents = {name: slope(one) for name, one in (ours | patterns).items()}
    verdict = "holds" if max(exponents[name] for name in ours) <= _AS_ONE_OVER_M else "in part"
    if min(exponents[name] for name in ours) > _HARDLY:
        verdict = "not seen at these sizes"
    shown = ", ".join(f"{name} {x:.2f}" for name, x in exponents.items())
    return verdict, (
        f"exponents of squared errors on pretrained heads (1/m is -1): {shown}; with as many "
        f"features as keys, features alone are nearer than the best pattern at {better} of "
        f"{len(budgets)} numbers of keys"
    )


def _stacking(parts: Parts) -> Verdict:
    found = {x: statistics.mean(part["layers"]) for x, part in section(parts, "reach").items()}
    sparse = {name: found[name] for name in SPARSE if name in found}
    if not sparse:
        return None
    ours = max(found[name] for name in PERFORMERS if name in found)
    more = [name for name, layers in sparse.items() if layers > ours]
    verdict = "holds" if len(more) == len(sparse) else "holds in part" if more else "refuted"
    shown = ", ".join(f"{name} {layers:.3g}" for name, layers in sparse.items())
    return verdict, f"layers until every token reaches all later ones: Performers {ours:g}; {shown}"


def _solving(parts: Parts, task: str) -> Verdict:
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


def _taking_over(parts: Parts, kind: str) -> Verdict:
    found = section(parts, kind)
    sparse = [name for name in PATTERNS if name in found]
    ours = [name for name in found if name not in PATTERNS]
    if not sparse or not ours:
        return None
    if any(x["perplexity"] is not None for x in found.values()):
        metric, word, sign = "perplexity", "lowest perplexity", 1
    else:
        metric, word, sign = "cosine", "highest cosine", -1
    values = {name: sign * part[metric] for name, part in found.items()}
    own, other = (min(names, key=values.__getitem__) for names in (ours, sparse))
    verdict = "holds" if values[own] < values[other] else "the reverse"
    shown = [f"{name} {digits(found[name][metric])}" for name in (own, other)]
    text = f"{word}, weights untouched: {', '.join(shown)}"
    if SOFTMAX in found:
        text += f" ({SOFTMAX} alone {digits(found[SOFTMAX][metric])})"
        if values[SOFTMAX] < values[other]:
            verdict = "holds, for features alone too"
    return verdict, text


@styled
def draw_steps(parts: Parts) -> Figure:
    """Processor time and peak memory of a training step against its length."""
    figure = new_figure((9.6, 4.6))
    axes = figure.subplots(1, 2)
    lines: list[tuple[str, Any]] = []
    for number, (name, one) in enumerate(section(parts, "step").items()):
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
