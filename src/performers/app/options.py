"""Options of commands, each written once: name, type, default, help and range.

A command's options are a frozen dataclass whose fields are made by `option`. The command line is
made from these fields (see ``performers.cli.commands``), and an instance checks itself.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Literal, get_args

from performers.app.errors import UserError

# The names are spelt here so that the command line starts without torch; a test compares them with
# those of `performers.features`.
Estimator = Literal[
    "positive", "hyperbolic", "trigonometric", "optimal", "sderf", "saderf", "data_aware"
]
ESTIMATORS = get_args(Estimator)
PROJECTIONS = ("orthogonal", "gaussian", "simplex", "hadamard", "antithetic")
"""Estimators and projections of random features."""

_BOUNDS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}
_INT64 = range(-(2**63), 2**63)


class OptionError(UserError, ValueError):
    """An option is out of range; the message begins with its flag."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The parts of an option that a dataclass field has no place for.

    Attributes:
        help: Text of ``--help``.
        flag: The flag where it is not the field's name, or the name of a positional argument.
        positional: Whether the option is a positional argument.
        path: Whether the text is a path.
        at_least: Least value.
        above: Value that every value exceeds.
        at_most: Largest value.
        below: Value that no value reaches.
        choices: Allowed values; of a tuple, allowed elements, each at most once.
        rising: Whether the numbers of a tuple are positive and rise.
        config: Attribute of the model's configuration that the option sets.
        keeps_weights: Whether a trained model fits another value of ``config``.
        changes_result: Whether a run with another value is another run.
        group: Heading of the help for this option and those after it.
        needs: Other fields, and the value or pattern (``favor-*``) that each must have for this
            option to have an effect; an empty pattern is any value that is true.
        excludes: Other fields that must be at their defaults beside this option.
    """

    help: str
    flag: str | None = None
    positional: bool = False
    path: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Collection[str] = ()
    rising: bool = False
    config: str | None = None
    keeps_weights: bool = False
    changes_result: bool = True
    group: str | None = None
    needs: Mapping[str, str] = field(default_factory=dict)
    excludes: tuple[str, ...] = ()

    def check(self, flag: str, value: Any) -> None:
        """Check a value.

        Raises:
            OptionError: The value is out of range or not among the choices.
        """
        elements = value if isinstance(value, tuple) else (value,)
        for element in elements:
            if isinstance(element, int) and element not in _INT64:
                raise OptionError(f"{flag} must be a 64-bit integer, got {element}")
            if self.choices and element not in self.choices:
                raise OptionError(
                    f"{flag} must be one of {', '.join(self.choices)}; got {element!r}"
                )
        if self.choices and len(set(elements)) < max(1, len(elements)):
            raise OptionError(
                f"{flag} must name each of {', '.join(self.choices)} at most once and one at "
                f"least, got {list(elements)}"
            )
        bounds = {word: bound for word in _BOUNDS if (bound := getattr(self, word)) is not None}
        if not all(_BOUNDS[word](value, bound) for word, bound in bounds.items()):
            words = (f"{word.replace('_', ' ')} {bound}" for word, bound in bounds.items())
            raise OptionError(f"{flag} must be {' and '.join(words)}, got {value}")
        if self.rising and (not value or value[0] < 1 or any(b <= a for a, b in pairwise(value))):
            raise OptionError(f"{flag} must be positive and rise, got {list(value)}")


def option(help: str, default: Any = MISSING, **declared: Any) -> Any:
    """A field of `Options`: a flag of the command.

    Args:
        help: Text of ``--help``.
        default: Default value; the option is required without one.
        declared: The other attributes of `Declaration`.
    """
    return field(default=default, metadata={"option": Declaration(help=help, **declared)})


def argument(help: str, **declared: Any) -> Any:
    """A field of `Options`: a required positional argument of the command."""
    return option(help, positional=True, **declared)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of the options of a command."""

    def __post_init__(self) -> None:
        """Check ranges, choices and the other options that an option needs or excludes.

        Raises:
            OptionError: An option is out of range, would have no effect, or excludes another.
        """
        for item in fields(self):
            value = getattr(self, item.name)
            if "option" not in item.metadata or value is None:
                continue
            declared, flag = item.metadata["option"], self.flag(item.name)
            declared.check(flag, value)
            if value == item.default:
                continue
            for name, pattern in declared.needs.items():
                found, other = getattr(self, name), self.flag(name)
                if not pattern and not found:
                    raise OptionError(f"{flag} needs {other}")
                if pattern and not fnmatchcase(str(found), pattern):
                    raise OptionError(f"{flag} needs {other} {pattern}, got {other} {found}")
            for name in declared.excludes:
                if getattr(self, name) != self.__dataclass_fields__[name].default:
                    raise OptionError(
                        f"{flag} cannot be combined with {self.flag(name)}; leave out one"
                    )

    @classmethod
    def decisive(cls) -> list[str]:
        """The fields of which another value makes another run."""
        declared = {item.name: item.metadata.get("option") for item in fields(cls)}
        return [name for name, x in declared.items() if x is None or x.changes_result]

    @classmethod
    def flag(cls, name: str) -> str:
        """The flag of a field."""
        declared = cls.__dataclass_fields__[name].metadata.get("option")
        return (declared and declared.flag) or "--" + name.replace("_", "-")
