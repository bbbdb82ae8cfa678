"""Commands made of functions and dataclasses of options; mistakes are told in one line."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from performers.app.errors import Interrupted, UserError
from performers.app.options import OptionError, Options
from performers.cli import interrupts
from performers.cli.console import messages

_LOWER = "--batch-tokens or --max-length, or the size of the model"
_ALLOCATION = ("DefaultCPUAllocator", "Storage size calculation overflowed")
# Of click, of which later releases of typer have a copy of their own.
_UsageError: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError"
)


class App(typer.Typer):
    """Commands that answer a mistake in their arguments in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=_Group, pretty_exceptions_enable=False, **options)

    def command(
        self,
        name: str | None = None,
        *,
        extra: str = "proteins",
        lower: str = _LOWER,
        example: str | None = None,
        defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Callable[[Any], Any]:
        """Register a function of dataclasses of options as a command.

        The fields of every parameter that is a subclass of `Options` become flags; other
        parameters are typer's, as are other options. ``extra`` and ``lower`` are those of
        `one_line_errors`; ``example`` is a call, shown below the help. ``defaults`` returns values
        for flags that were left out, from the values of those that were given;
        the function then has a ``context``.
        """
        epilog = f"Example: {example}" if example else None
        register = super().command(name, cls=_Command, epilog=epilog, **options)

        def decorate(function: Callable[..., None]) -> Callable[..., None]:
            register(_with_flags(function, extra, lower, defaults))
            return function

        return decorate


class _Command(TyperCommand):
    def main(self, *args: Any, **options: Any) -> NoReturn:
        _run(super().main, *args, **options)


class _Group(TyperGroup):
    def main(self, *args: Any, **options: Any) -> NoReturn:
        _run(super().main, *args, **options)


def _with_flags(
    function: Callable[..., None],
    extra: str,
    lower: str,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None,
) -> Callable[..., None]:
    """The function with its options as keyword arguments, in the form that typer reads."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Options]] = {}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if isinstance(hints[name], type) and issubclass(hints[name], Options):
            groups[name] = hints[name]
            panel = None
            for item in fields(hints[name]):
                declared = item.metadata.get("option")
                panel = (declared and declared.group) or panel
                # An option of two groups is one flag.
                if "option" in item.metadata and item.name not in parameters:
                    parameters[item.name] = _parameter(hints[name], item, panel)
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters[name] = parameter.replace(kind=keyword, annotation=hints[name])

    def run(**given: Any) -> None:
        with one_line_errors(extra, lower):
            if defaults is not None:
                named = {x: given[x] for x in given if is_given(given["context"], x)}
                given |= defaults(named)
            others = {name: given[name] for name in given.keys() & hints.keys() - groups.keys()}
            made = {name: _made(group, given) for name, group in groups.items()}
            function(**others, **made)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    return run


def is_given(context: typer.Context, name: str) -> bool:
    """True if the command line has a value for a parameter."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parameter(group: type[Options], item: Field[Any], panel: str | None) -> inspect.Parameter:
    """A field as a parameter of typer, below a heading of the help."""
    declared, flag = item.metadata["option"], group.flag(item.name)
    hint = get_type_hints(group)[item.name]
    default = inspect.Parameter.empty if item.default is MISSING else item.default
    if _reader(hint) is not None:
        hint = str | None
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
    elif declared.path:
        hint, default = Path if item.default is MISSING else Path | None, default or None
    elif get_origin(hint) is Literal:
        hint = str
    if declared.positional:
        info = typer.Argument(help=declared.help, metavar=declared.flag, show_default=False)
    else:
        # A switch that is on has a flag to turn it off.
        names = f"{flag}/--no-{flag[2:]}" if default is True else flag
        info = typer.Option(names, help=declared.help, rich_help_panel=panel)
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info]
    )


def _made(group: type[Options], given: dict[str, Any]) -> Options:
    """An instance of a group, of values from the command line."""
    hints, values = get_type_hints(group), {}
    for item in fields(group):
        value, reader = given.get(item.name), _reader(hints[item.name])
        # An empty list is the default where that is one.
        if value is None or (reader is not None and not value and not item.default):
            continue
        if reader is not None:
            value = reader(group.flag(item.name), value)
        elif item.metadata["option"].path:
            value = str(value)
        values[item.name] = value
    return group(**values)


def _reader(hint: Any) -> Callable[[str, str], Any] | None:
    """The function that reads a type typer has no flag for from a flag and its text."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    for kind in (hint, *kinds):
        if get_origin(kind) is tuple:
            return _integers if get_args(kind)[0] is int else _names
    return _number if {int, float} <= set(kinds) else None


def _integers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(
            f"{flag} must be whole numbers with commas between, got {text!r}"
        ) from error


def _names(flag: str, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number(flag: str, text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise OptionError(f"{flag} must be a number, got {text!r}") from error


@contextmanager
def one_line_errors(extra: str, lower: str) -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit code 2; Ctrl-C into 130.

    ``extra`` has the packages of the command; ``lower`` is to be lowered when memory runs out.
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
    except MemoryError:
        _fail(out_of_memory, 2)
    except ImportError as error:
        _fail(f"{error}; install what is missing with pip install 'performers[{extra}]'", 2)
    except RuntimeError as error:
        # What torch raises when memory of a device or of the machine is full, or none is enough.
        if type(error).__name__ != "OutOfMemoryError" and not any(
            sign in str(error) for sign in _ALLOCATION
        ):
            raise
        _fail(out_of_memory, 2)
    except Interrupted as error:
        _fail(str(error), interrupts.CODE)
    except KeyboardInterrupt:
        _fail("interrupted", interrupts.CODE)


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


def _fail(text: str, code: int) -> NoReturn:
    line = " ".join(text.split())
    messages.print(f"performers: {line}", markup=False, soft_wrap=True)
    if code == interrupts.CODE:
        interrupts.announced()
    sys.exit(code)
