"""Results of the accuracy benchmark as tables on the console."""

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from performers.benchmark.groups import MEASURED
from performers.benchmark.results import Results, Row
from performers.cli.benchmark_tables import seconds

# As in the results; importing their modules would import transformers.
_MEAN, _FINAL = "mean", "final"
_KERNEL_MEASURES = {
    "kernel_relative": "squared relative error of exp(scale q . k)",
    "output_error": "relative error of the output",
}


def kernel_tables(results: Results) -> list[Table]:
    """Errors against the number of features: two tables for each kind of data.

    Args:
        results: Of the kernel part.

    Returns:
        The tables, means over draws; the other measures are in the files.
    """
    found = []
    for data in _distinct(results.rows, "data"):
        rows = [row for row in results.rows if row["data"] == data]
        pairs = list(dict.fromkeys((row["estimator"], row["projection"]) for row in rows))
        counts = _distinct(rows, "num_features")
        values = {(row["estimator"], row["projection"], row["num_features"]): row for row in rows}
        for measure, label in _KERNEL_MEASURES.items():
            table = _table(
                f"{data}: {label}", ["estimator", "projection"], [f"{m:,}" for m in counts]
            )
            for number, pair in enumerate(pairs):
                first = number == 0 or pairs[number - 1][0] != pair[0]
                cells = [values.get((*pair, count), {}).get(measure) for count in counts]
                table.add_row(pair[0] if first else "", pair[1], *(error(x) for x in cells))
            found.append(table)
    return found


def heads_tables(results: Results) -> list[Table]:
    """Errors by layer, and the means beside the times.

    Args:
        results: Of the heads part.

    Returns:
        The tables; what failed says why.
    """
    means = [row for row in results.rows if row["layer"] == _MEAN]
    layers = [layer for layer in _distinct(results.rows, "layer") if layer != _MEAN]
    middle = results.settings["num_features"]
    by_layer = _table(
        f"relative error of the output by layer, {middle} features",
        ["setting"],
        [str(layer) for layer in layers],
    )
    rows = [row for row in results.rows if row["layer"] != _MEAN]
    errors = {(row["setting"], row["num_features"], row["layer"]): row["error"] for row in rows}
    for setting, count in dict.fromkeys((row["setting"], row["num_features"]) for row in rows):
        if count in (0, middle):
            cells = [errors.get((setting, count, layer)) for layer in layers]
            by_layer.add_row(setting, *(error(x) for x in cells))
    columns: dict[str, Callable[[Row], str]] = {
        "features": lambda row: f"{row['num_features']:,}" if row["num_features"] else "",
        "mean\nerror": lambda row: error(row["error"]),
        "a call": lambda row: seconds(row["seconds"]),
        "SDPA\n/ this": lambda row: _two(row["sdpa_ratio"]),
        "": lambda row: "front" if row.get("front") else "",
    }
    by_time = _table(
        "mean over layers; front: no other is both faster and better", ["setting"], list(columns)
    )
    for row in means:
        by_time.add_row(row["setting"], *(show(row) for show in columns.values()))
    by_time.caption = _reasons(results.rows)
    return [by_layer, by_time]


def model_tables(results: Results) -> list[Table]:
    """What the model ends with under each setting.

    Args:
        results: Of the model part.

    Returns:
        One table; what failed says why.
    """
    rows = [row for row in results.rows if row["layer"] == _FINAL]
    columns: dict[str, Callable[[Row], str]] = {
        "features": lambda row: f"{row['num_features']:,}" if row["num_features"] else "",
        "error of\nhidden states": lambda row: error(row.get("error")),
        "cosine": lambda row: "" if row.get("cosine") is None else f"{row['cosine']:.3f}",
        "perplexity": lambda row: error(row.get("replaced_perplexity")),
        "of the\noriginal": lambda row: error(row.get("perplexity")),
    }
    shown = {name: show for name, show in columns.items() if any(show(row) for row in rows)}
    table = _table("the end of the model", ["setting"], list(shown))
    for row in rows:
        table.add_row(row["setting"], *(show(row) for show in shown.values()))
    table.caption = _reasons(rows)
    return [table]


def error(value: float | None) -> str:
    """An error with three digits; powers of ten where it is tiny or huge; empty for None."""
    if value is None:
        return ""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    return f"{value:.1e}"


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}×"


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _reasons(rows: Iterable[Row]) -> str | None:
    """Why settings failed, one reason each."""
    reasons: dict[tuple[str, int], str] = {}
    for row in rows:
        if row["status"] != MEASURED:
            setting = (row["setting"], row["num_features"])
            reasons.setdefault(setting, f"layer {row['layer']}: {row['reason']}")
    lines = [f"{name}, {count:,} features: {why}" for (name, count), why in reasons.items()]
    return "\n".join(lines) or None


def _distinct(rows: Iterable[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))
