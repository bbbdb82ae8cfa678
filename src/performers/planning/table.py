"""A plan as plain text, at most 100 columns wide."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

from performers.planning.settings import USABLE_ERROR, Setting

if TYPE_CHECKING:
    from performers.planning.planner import Plan

_HEADER = (
    "", "estimator", "projection", "fit", "m", "window", "sinks", "listed", "error", "ms",
    "x exact", "mul-adds",
)  # fmt: skip
_LEFT_ALIGNED = 4


def plan_text(plan: Plan, *, every: bool = False) -> str:
    """The recommendation, the diagnosis and a table."""
    best, diagnosis = plan.recommended, plan.diagnosis
    _, heads, key_heads, _, head_dim = plan.sample_shape
    held_out, length = plan.held_out
    exact = number(1e3 * plan.exact_seconds)
    grouped = f" ({key_heads} key heads)" if key_heads != heads else ""
    if best.ratio > 1:
        crossing = plan.length * best.ratio
        crossing = round(crossing, 1 - math.floor(math.log10(crossing)))
        comparison = (
            "at this length and has no error: prefer it here. Its time grows with the square of "
            f"the length, so that the setting is faster from about {crossing:,.0f} positions on; "
            "plan(length=...) measures there."
        )
    else:
        comparison = f"{1 / best.ratio:.3g} times as long."
    settings = [best, *(x for x in _shown(plan, every) if x is not best)]
    left_out = len(plan.settings) - len(settings)
    more = f"; {left_out} more settings in plan.settings" if left_out else ""
    paragraphs = (
        f"Recommended: {best.label()} ({plan.reason}): error {best.error:.3f} on sequences of "
        f"{length:,}, {number(1e3 * best.seconds)} ms for one of {plan.length:,}. Exact attention "
        f"(scaled_dot_product_attention) takes {exact} ms{' ' if best.ratio > 1 else ', '}"
        f"{comparison}",
        *_warning(plan),
        f"{len(plan.settings)} settings, {heads} heads{grouped} of {head_dim}; errors on "
        f"{held_out} held-out sequence{'s' if held_out > 1 else ''} of {length:,}. Scaled: |q|^2 "
        f"{diagnosis.query_norm:.1f}, |k|^2 {diagnosis.key_norm:.1f}, |q+k|^2 "
        f"{diagnosis.sum_norm:.1f} ({diagnosis.centred_sum_norm:.1f} centred) and "
        f"{diagnosis.attended_sum_norm:.1f} where attention is "
        f"({diagnosis.calibrated_sum_norm:.1f} calibrated), effective dimension "
        f"{diagnosis.effective_dimension:.1f}.",
        diagnosis.sentence,
        "-> recommended, * on the front of error against time; x exact: time over "
        f"scaled_dot_product_attention's; mul-adds per query and head{more}.",
    )
    rows = [_HEADER, *(_cells(x, plan) for x in settings)]
    adds = f"{plan.exact_multiply_adds:,.0f}"
    rows.append(("", "exact", "", "", "", "", "", "", "0", exact, "1.00", adds))
    *texts, legend = (textwrap.fill(text, 100) for text in paragraphs)
    return "\n\n".join((*texts, _aligned(rows), legend))


def _warning(plan: Plan) -> tuple[str, ...]:
    """A paragraph if the recommended setting is no good."""
    if plan.is_usable:
        return ()
    least = min(plan.settings, key=lambda setting: setting.error)
    better = "no setting has less"
    if least.error < plan.recommended.error:
        better = f"the least is {least.error:.3f}, of {least.label()}"
    return (
        f"NO GOOD: an error above {USABLE_ERROR:g} is more than half of the output; {better}. "
        "Measure larger windows, more features and more listed_keys, or keep this attention exact.",
    )


def number(x: float) -> str:
    """Three significant digits, never with an exponent."""
    if x <= 0 or not math.isfinite(x):
        return f"{x:g}"
    return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}"


def _shown(plan: Plan, every: bool) -> list[Setting]:
    """The front and each estimator's best without exact pairs, or all; fastest first."""
    shown = list(plan.settings if every else plan.front)
    for estimator in dict.fromkeys(setting.estimator for setting in plan.settings):
        alone = [x for x in plan.settings if x.estimator == estimator and not x.has_exact_pairs]
        least = min(alone, key=lambda setting: setting.error, default=None)
        if least is not None and least not in shown:
            shown.append(least)
    return sorted(shown, key=lambda setting: setting.seconds)


def _cells(setting: Setting, plan: Plan) -> tuple[str, ...]:
    spread = "" if setting.error_sd is None else f"±{setting.error_sd:.3f}"
    return (
        "->" if setting is plan.recommended else " *" if setting in plan.front else "",
        setting.estimator,
        setting.projection,
        setting.heads,
        str(setting.num_features),
        "-" if setting.window is None else str(setting.window),
        str(setting.sinks or "-"),
        str(setting.listed_keys or "-"),
        f"{setting.error:.3f}{spread}",
        number(1e3 * setting.seconds),
        number(setting.ratio),
        f"{setting.multiply_adds:,.0f}",
    )


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    between = "  " if sum(widths) + 2 * (len(widths) - 1) <= 100 else " "
    lines = (
        between.join(
            cell.ljust(width) if column < _LEFT_ALIGNED else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
