"""What commands share: errors in one line, progress, tables."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

import torch
import typer
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
from typer.core import TyperCommand, TyperGroup

from performers.cli import interrupts
from performers.proteins.errors import Interrupted, UserError
from performers.proteins.processes import is_first_process

output = Console(highlight=False)
messages = Console(stderr=True, highlight=False)

_LOWER = "--batch-tokens or --max-length, or the size of the model"
# Of click, of which later releases of typer have a copy of their own.
_UsageError: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)
_ALLOCATION = ("DefaultCPUAllocator", "Storage size calculation overflowed")
INT64 = range(-(2**63), 2**63)
_SHOWN = {"loss": "loss", "eval_accuracy": "validation accuracy"}


class App(typer.Typer):
    """Commands that answer a mistake in their arguments in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            cls=_Group, pretty_exceptions_enable=False, add_completion=False, **options
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """As in typer."""
        return super().command(name, cls=_Command, **options)


class _Command(TyperCommand):
    def main(self, *args: Any, **options: Any) -> NoReturn:
        _run(super().main, *args, **options)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and refuse integers that no tensor can have."""
        rest = super().parse_args(ctx, args)
        params: list[Any] = list(self.params)
        for param in params:
            value = ctx.params.get(param.name)
            if isinstance(value, int) and value not in INT64:
                raise typer.BadParameter(f"{value} is not a 64-bit integer.", ctx=ctx, param=param)
        return rest


class _Group(TyperGroup):
    def main(self, *args: Any, **options: Any) -> NoReturn:
        _run(super().main, *args, **options)


def _run(main: Callable[..., Any], *args: Any, **options: Any) -> NoReturn:
    try:
        code = main(*args, **{**options, "standalone_mode": False})
    except _UsageError as error:
        # A group without a command prints its help.
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        place = error.ctx.command_path if error.ctx else "performers"
        _fail(f"{error.format_message().rstrip('.')}; see {place} --help", 2)
    except typer.Abort:
        code = interrupts.CODE
    if code == interrupts.CODE:
        _fail("interrupted", code)
    sys.exit(code)


@contextmanager
def one_line_errors(extra: str = "proteins", lower: str = _LOWER) -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit code 2; Ctrl-C into 130.

    Args:
        extra: The extra that has the packages of the command.
        lower: What to lower when memory runs out.
    """
    out_of_memory = f"out of memory; lower {lower}"
    try:
        with interrupts.raised():
            yield
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}", 2)
    except (MemoryError, torch.OutOfMemoryError):
        _fail(out_of_memory, 2)
    except ImportError as error:
        _fail(f"{error}; install what is missing with pip install 'performers[{extra}]'", 2)
    except RuntimeError as error:
        # What torch raises when the machine's own memory is full, or no memory could be enough.
        if not any(sign in str(error) for sign in _ALLOCATION):
            raise
        _fail(out_of_memory, 2)
    except Interrupted as error:
        _fail(str(error), interrupts.CODE)
    except KeyboardInterrupt:
        _fail("interrupted", interrupts.CODE)


def note(text: str | None) -> None:
    """Print a line on stderr, if there is one; of several processes the first does."""
    if text and is_first_process():
        messages.print(text, markup=False, soft_wrap=True)


def print_metrics(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Print a table: a row per model or split, the unigram baseline beside.

    Of several processes the first does.
    """
    if not is_first_process():
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(no_wrap=True)
    for heading in ("accuracy", "perplexity", "residues", "unigram\naccuracy", "\nperplexity"):
        table.add_column(heading, justify="right")
    for name, row in metrics.items():
        table.add_row(
            name,
            f"{100 * row['accuracy']:.2f}%",
            f"{row['perplexity']:.3f}",
            f"{row['tokens']:,.0f}",
            f"{100 * row['baseline_accuracy']:.2f}%",
            f"{row['baseline_perplexity']:.3f}",
        )
    output.print(table)


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
        self._logs: dict[str, dict[str, float]] = {}

    def __enter__(self) -> "ProgressBars":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, name: str, done: int, total: int, log: Mapping[str, float]) -> None:
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
        tenth = 10 * done // max(total, 1)
        if tenth > self._tenths.get(name, 0):
            self._tenths[name] = tenth
            note(f"{name}: {done:,} of {total:,}  {text}".rstrip())

    def task(self, name: str) -> Callable[[int, int], None]:
        """A callback of (done, total) for one piece of work."""
        return lambda done, total: self.update(name, done, total, {})

    def training(self, name: str) -> Callable[[int, int, dict[str, float]], None]:
        """A callback of (step, steps, log entry) for a training run."""
        return lambda done, total, log: self.update(name, done, total, log)


def _fail(text: str, code: int) -> NoReturn:
    line = " ".join(text.split())
    messages.print(f"performers: {line}", markup=False, soft_wrap=True)
    if code == interrupts.CODE:
        interrupts.announced()
    sys.exit(code)
