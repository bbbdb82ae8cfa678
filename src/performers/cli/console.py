"""Text of commands on the console: notes, tables of metrics, progress."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from performers.app.processes import is_first_process
from performers.app.progress import duration

output = Console(highlight=False)
messages = Console(stderr=True, highlight=False)

_SHOWN = {"loss": "loss", "eval_accuracy": "validation accuracy"}


def note(text: str | None) -> None:
    """Print a line on stderr, in the first of several processes."""
    if text and is_first_process():
        messages.print(text, markup=False, soft_wrap=True)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> Table:
    """A table of names, in the first column, and numbers."""
    drawn = Table(
        title=title or None,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, heading in enumerate(headings):
        # On a narrow terminal it is the numbers that wrap.
        drawn.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        drawn.add_row(*row)
    return drawn


def print_metrics(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print a row per model or split, in the first process.

    Metrics of proteins stand beside the unigram baseline, those of texts have bits per byte.
    """
    if not is_first_process():
        return
    columns: dict[str, Callable[[Mapping[str, float]], str]] = {
        "accuracy": lambda row: f"{100 * row['accuracy']:.2f}%",
        "perplexity": lambda row: f"{row['perplexity']:.3f}",
    }
    if all("bits_per_byte" in row for row in metrics.values()):
        columns["tokens"] = lambda row: f"{row['tokens']:,.0f}"
        columns["bits per byte"] = lambda row: f"{row['bits_per_byte']:.4f}"
    else:
        columns["residues"] = lambda row: f"{row['tokens']:,.0f}"
        columns["unigram\naccuracy"] = lambda row: f"{100 * row['baseline_accuracy']:.2f}%"
        columns["\nperplexity"] = lambda row: f"{row['baseline_perplexity']:.3f}"
    rows = [(name, *(show(row) for show in columns.values())) for name, row in metrics.items()]
    output.print(table(("", *columns), rows))


class ProgressBars:
    """Progress on stderr: bars on a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        if messages.is_terminal and is_first_process():
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[log]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=messages,
            )
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._logs: dict[str, dict[str, float]] = {}

    def __enter__(self) -> "ProgressBars":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(
        self, name: str, done: int, total: int, log: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Show how far a piece of work is."""
        logs = self._logs.setdefault(name, {})
        logs.update((_SHOWN[key], value) for key, value in log.items() if key in _SHOWN)
        text = "  ".join(f"{label} {value:.3f}" for label, value in logs.items())
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, log=text)
            self._bars.update(self._tasks[name], completed=done, total=total, log=text)
            return
        # `note` keeps all but the first of several processes quiet.
        now, tenth = time.monotonic(), 10 * done // max(total, 1)
        begun, first = self._begun.setdefault(name, (now, done))
        if tenth > self._tenths.get(name, 0):
            self._tenths[name] = tenth
            left = (now - begun) * (total - done) / max(done - first, 1)
            if left >= 1 and done > first:
                text = f"{text}  about {duration(left)} left"
            note(f"{name}: {done:,} of {total:,}  {text.strip()}".rstrip())

    def task(self, name: str) -> Callable[..., None]:
        """A callback of (done, total), and perhaps a log entry, for one piece of work."""
        return partial(self.update, name)

    def part(self, name: str, before: int, total: int) -> Callable[[int, int], None]:
        """A callback of (done, of the part) for a part of one piece of work."""
        return lambda done, _: self.update(name, before + done, total)
