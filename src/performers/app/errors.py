"""Errors that commands report in one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An argument or a file cannot be used; the message is one line and names the remedy."""


class Interrupted(Exception):
    """Ctrl-C stopped a run after it was saved; the message says how to resume."""


class Diverged(UserError):
    """The loss or the weights of a training became infinite or NaN."""


@contextmanager
def bare_exceptions(name: str) -> Iterator[None]:
    """Context in which an exception of the base class itself becomes a ValueError.

    The tokenizers library raises no other. Exceptions of derived classes pass. The message of the
    ValueError begins with ``name``, the file or other input at fault.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ValueError(f"{name}: {error}") from error
