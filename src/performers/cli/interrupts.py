"""Ctrl-C: one line and exit code 130 whenever it comes, and however often."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

CODE = 130
"""Exit code of an interrupted command."""

_announced = False


def end_at_once() -> None:
    """Make Ctrl-C end the process where it is: nothing has begun, or everything is done.

    A KeyboardInterrupt would be reported as a traceback by whatever it falls into, such as the
    import of a library or the interpreter's shutdown. A process started in the background of a
    shell ignores the signal, and goes on doing so.
    """
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _raise):
        signal.signal(signal.SIGINT, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Context of a command's work, in which the first Ctrl-C raises a KeyboardInterrupt.

    The second one ends the process. Without `end_at_once` before it changes nothing.
    """
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    sys.unraisablehook = _report
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        end_at_once()


def announced() -> None:
    """Leave the rest to a command that ends after an interrupt, and has said so."""
    global _announced
    _announced = True


def _raise(number: int, frame: FrameType | None) -> None:
    if not _announced:
        signal.signal(signal.SIGINT, _end)
        raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    if not _announced:
        # Not print: the signal may have come within one.
        os.write(2, b"performers: interrupted\n")
        os._exit(CODE)


def _report(unraisable: Any) -> None:
    """Report what cannot be raised; an interrupt among it would be lost."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _end(signal.SIGINT, None)
    else:
        sys.__unraisablehook__(unraisable)
