"""Errors that commands report in one line."""

from contextlib import AbstractContextManager
from typing import Any


class UserError(Exception):
    """An argument or a file cannot be used; the message is one line and names the remedy."""


class Interrupted(Exception):
    """Ctrl-C stopped a run after it was saved; the message says how to resume."""


class Diverged(UserError):
    """The loss or the weights of a training became infinite or NaN."""


class BareExceptions(AbstractContextManager[None]):
    """Context in which an exception of the base class itself becomes a ValueError.

    The tokenizers library raises no other. Exceptions of derived classes pass.

    Args:
        name: File or other input at fault, which the message of the ValueError begins with.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: Any) -> None:
        """Raise the ValueError."""
        if kind is Exception:
            raise ValueError(f"{self._name}: {error}") from error
