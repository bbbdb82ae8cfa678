"""A plan as plain text, at most 100 columns wide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from performers.planning.settings import Setting

if TYPE_CHECKING:
    from performers.planning.result import Plan

WIDTH = 100
_HEADER = (
    "", "estimator", "projection", "fit", "m", "window", "sinks", "listed", "error", "ms",
    "x exact", "mul-adds",
)  # fmt: skip
_LEFT = 4


def plan_text(plan: Plan, *, every: bool = False) -> str:
    """The recommendation, the diagnosis and a table."""
    best, others = plan.recommended, _rows(plan, every)
    settings = [best, *(setting for setting in others if setting is not best)]
    rows: list[tuple[str, ...]] = [_HEADER]
    for setting in settings:
        mark = "->" if setting is best else " *" if setting in plan.front else ""
        rows.append((mark, *_cells(setting)))
    exact = number(1e3 * plan.exact_seconds)
    adds = f"{plan.exact_multiply_adds:,.0f}"
    rows.append(("", "exact", "", "", "", "", "", "", "0", exact, "1.00", adds))
    left_out = len(plan.settings) - len(settings)
    more = f"; {left_out} more settings in plan.settings" if left_out else ""
    return "\n\n".join(
        (
            _wrap(recommendation(plan)),
            _wrap(describe(plan)),
            _wrap(plan.diagnosis.sentence),
            "\n".join(_columns(rows)),
            _wrap(
                "-> recommended, * on the front of error against time; x exact: time over "
                f"scaled_dot_product_attention's; mul-adds per query and head{more}."
            ),
        )
    )


def recommendation(plan: Plan) -> str:
    """What to take and why, in words."""
    best = plan.recommended
    text = (
        f"Recommended: {best.label()} ({plan.reason}): error {best.error:.3f} on sequences of "
        f"{plan.held_out[1]:,}, {number(1e3 * best.seconds)} ms for one of {plan.length:,}."
    )
    milliseconds = number(1e3 * plan.exact_seconds)
    exact = f"Exact attention (scaled_dot_product_attention) takes {milliseconds} ms"
    if best.ratio > 1:
        crossing = plan.length * best.ratio
        rounded = round(crossing, 1 - math.floor(math.log10(crossing)))
        return (
            f"{text} {exact} at this length and has no error: prefer it here. Its time grows with "
            f"the square of the length, so that the setting is faster from about {rounded:,.0f} "
            "positions on; plan(length=...) measures there."
        )
    return f"{text} {exact}, {1 / best.ratio:.3g} times as long."


def describe(plan: Plan) -> str:
    """What was measured, and what queries and keys are like."""
    _, heads, key_heads, _, head_dim = plan.sample_shape
    rows, length = plan.held_out
    found = plan.diagnosis
    grouped = f" ({key_heads} key heads)" if key_heads != heads else ""
    return (
        f"{len(plan.settings)} settings, {heads} heads{grouped} of {head_dim}; errors on {rows} "
        f"held-out sequence{'s' if rows > 1 else ''} of {length:,}. Scaled: |q|^2 "
        f"{found.query_norm:.1f}, |k|^2 {found.key_norm:.1f}, |q+k|^2 {found.sum_norm:.1f} "
        f"({found.centred_sum_norm:.1f} centred) and {found.attended_sum_norm:.1f} where attention "
        f"is ({found.calibrated_sum_norm:.1f} calibrated), effective dimension "
        f"{found.effective_dimension:.1f}."
    )


def number(x: float) -> str:
    """Three significant digits, never with an exponent."""
    if x <= 0 or not math.isfinite(x):
        return f"{x:g}"
    return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}"


def _rows(plan: Plan, every: bool) -> Sequence[Setting]:
    """What to show after the recommendation, fastest first."""
    shown = list(plan.settings) if every else list(plan.front)
    if not every:
        for estimator in dict.fromkeys(setting.estimator for setting in plan.settings):
            alone = [
                setting
                for setting in plan.settings
                if setting.estimator == estimator and not setting.has_exact_pairs
            ]
            least = min(alone, key=lambda setting: setting.error, default=None)
            if least is not None and least not in shown:
                shown.append(least)
    return sorted(shown, key=lambda setting: setting.seconds)


def _cells(setting: Setting) -> tuple[str, ...]:
    spread = "" if setting.error_sd is None else f"±{setting.error_sd:.3f}"
    return (
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


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    between = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    return [
        between.join(
            cell.ljust(width) if column < _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH)
