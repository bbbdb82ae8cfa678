"""Tables of the results of ``performers benchmark attention``, ``model`` and ``decode``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from performers.benchmark.table import digits, nbytes, percent, seconds, times
from studies.pages import Table, pivot

Shown = tuple[str, Callable[[Mapping[str, Any]], str]]
"""Heading of a column, a format of the row, and its cell; rows whose cell is empty have none."""

NATIVE = "performers native"


def tables(content: Mapping[str, Any]) -> dict[str, Table]:
    """Tables of a ``results.json``: contestants across, a line for each length.

    Of several results of ``benchmark attention``, as ``{"runs": [...]}``, a table of SDPA's time to
    ours by instruction set and threads.
    """
    if "runs" in content:
        return {"ratios": _instruction_sets(content["runs"])}
    make = {"attention": _attention, "model": _model, "decode": _decode}[content["benchmark"]]
    return {name: table for name, table in make(content["rows"]).items() if table.rows}


def _attention(rows: list[Mapping[str, Any]]) -> dict[str, Table]:
    def native(name: str, unit: Callable[[float | None], str]) -> Callable[..., str]:
        return lambda row: unit(row[name]) if row["contestant"] == NATIVE else ""

    time = [
        ("{contestant}", lambda row: seconds(row["seconds"])),
        ("SDPA / native", native("sdpa_ratio", times)),
        ("native GFLOP/s", native("gflops_per_second", digits)),
        ("of the floor", native("floor_share", percent)),
    ]
    made = {}
    for direction in ("bidirectional", "causal"):
        for passes in ("forward", "forward+backward"):
            some = [x for x in rows if (x["direction"], x["passes"]) == (direction, passes)]
            made[f"{direction}_{passes.replace('+', '_')}"] = _table(some, ("length",), time)
    memory = [("{contestant}", lambda row: nbytes(row["peak_bytes"]))]
    return {**made, "memory": _table(rows, ("length", "direction", "passes"), memory)}


def _instruction_sets(runs: list[Mapping[str, Any]]) -> Table:
    cells = [
        {**row, "column": f"{run['machine']['native']}, {run['settings']['threads']} thread(s)"}
        for run in runs
        for row in run["rows"]
        if row["contestant"] == NATIVE
    ]
    lines = ("direction", "passes", "length")
    return pivot(cells, lines, "column", lambda row: times(row["sdpa_ratio"])).filled()


def _model(rows: list[Mapping[str, Any]]) -> dict[str, Table]:
    def compared(shown: Callable[[Mapping[str, Any]], str], ratio: str) -> Table:
        def over_identity(row: Mapping[str, Any]) -> str:
            return "" if row["attention"] == "identity" else times(row[ratio])

        columns = [("{attention}", shown), ("{attention} / identity", over_identity)]
        return _table(rows, ("length",), columns)

    return {
        "time": compared(lambda row: seconds(row["seconds"]), "over_identity"),
        "memory": compared(lambda row: nbytes(row["peak_bytes"]), "memory_over_identity"),
    }


def _decode(rows: list[Mapping[str, Any]]) -> dict[str, Table]:
    shown = [
        ("{contestant}", lambda row: seconds(row["seconds"])),
        ("{contestant}, state", lambda row: nbytes(row["state_bytes"])),
    ]
    levels = dict.fromkeys(row["level"] for row in rows)
    return {
        level: _table([row for row in rows if row["level"] == level], ("context",), shown)
        for level in levels
    }


def _table(rows: list[Mapping[str, Any]], lines: tuple[str, ...], shown: list[Shown]) -> Table:
    cells = (
        {**row, "column": heading.format(**row), "cell": cell}
        for heading, show in shown
        for row in rows
        if (cell := show(row))
    )
    return pivot(cells, lines, "column", lambda row: str(row["cell"]))
