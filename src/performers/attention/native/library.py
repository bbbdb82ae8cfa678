"""The compiled library: where it is, whether it can be used, and why not.

It is a shared library with a C interface, loaded with ctypes, so one build serves every Python and
every torch. Two environment variables, read when ``performers`` is imported, change the choice:

* ``PERFORMERS_NATIVE_LIBRARY``: the path of a library to use in place of the installed one.
* ``PERFORMERS_NATIVE_ISA``: the instruction set to use, one of ``avx512``, ``avx2``, ``portable``.

A library that is missing or does not load leaves a reason and the other backends. A variable that
cannot be honoured is an error at first use: whoever set it must not get something else unnoticed.
"""

import ctypes
import logging
import os
import sys
import threading
from pathlib import Path

import torch

# PERFORMERS_ABI_VERSION in csrc/performers_native.h: the functions and the structures they take.
ABI_VERSION = 7

_PATH_VARIABLE = "PERFORMERS_NATIVE_LIBRARY"
_ISA_VARIABLE = "PERFORMERS_NATIVE_ISA"
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_NAME = f"libperformers_native{_SUFFIX}"


class _Unusable(Exception):
    """Reason why the library cannot be used; ``demanded`` when a variable asked for it."""

    def __init__(self, reason: str, demanded: bool) -> None:
        super().__init__(reason)
        self.demanded = demanded


def _locate() -> tuple[Path, bool]:
    """The library's path, and whether the variable named it."""
    if named := os.environ.get(_PATH_VARIABLE):
        path = Path(named)
        if not path.is_file():
            raise _Unusable(
                f"{_PATH_VARIABLE} must be the path of the compiled library, got {named!r}, "
                "which is not a file; correct or unset it",
                demanded=True,
            )
        return path.absolute(), True
    # An editable install has the sources in one folder and the library in another, unless
    # tools/build_native has put a later one next to the sources.
    for folder in (Path(__file__).parent, *map(Path, sys.modules[__package__].__path__)):
        if (path := folder / _NAME).is_file():
            return path, False
    raise _Unusable(
        "the compiled kernels are not in this installation (no C++20 compiler when it was built?); "
        "install GCC or Clang, then: pip install --force-reinstall --no-deps --no-cache-dir "
        "performers (or the folder it came from; -v shows why a build fails)",
        demanded=False,
    )


def _open() -> ctypes.CDLL:
    path, demanded = _locate()
    origin = f"{_PATH_VARIABLE} names {path}, which" if demanded else f"{path}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unusable(f"{origin} does not load: {error}", demanded) from error
    try:
        version = library.performers_abi_version()
        for name in ("performers_isa", "performers_available_isas", "performers_error"):
            getattr(library, name).restype = ctypes.c_char_p
    except AttributeError as error:
        raise _Unusable(f"{origin} is not the library of performers: {error}", demanded) from error
    if version != ABI_VERSION:
        raise _Unusable(
            f"{origin} has version {version} of the interface, expected {ABI_VERSION}: it was "
            "built from other sources; build it again (pip install, or tools/build_native)",
            demanded,
        )
    if library.performers_isa() is None:
        reason = (library.performers_error() or b"no instruction set can be used").decode()
        raise _Unusable(reason, demanded=bool(os.environ.get(_ISA_VARIABLE)))
    return library


# Decided on import, though nothing is raised there: torch.compile can read these values, but can
# trace neither the loading of a library nor a cache filled on first use.
_library: ctypes.CDLL | None = None
_reason: str | None = None
_demanded = False
try:
    _library = _open()
except _Unusable as unusable:
    _reason, _demanded = str(unusable), unusable.demanded

_lock = threading.Lock()
_told = False


def available() -> bool:
    """True if the library can be used.

    The first False of a process is explained in one line to the logger ``performers``. It is a
    warning because that is the lowest level that Python shows unasked, and a user who is left
    with a slower backend should hear of it once.

    Raises:
        RuntimeError: An environment variable asks for a library or an instruction set that cannot
            be had.
    """
    if _reason is not None:
        if _demanded:
            raise RuntimeError(_reason)
        if not torch.compiler.is_compiling():
            _tell()
    return _reason is None


def unavailable_reason() -> str | None:
    """Reason why the library cannot be used; None when it can."""
    return _reason


def load() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: It cannot be used; the message is ``unavailable_reason()``.
    """
    if _library is None:
        raise RuntimeError(_reason)
    return _library


def isa() -> str:
    """The instruction set in use, such as ``"avx512"``."""
    return load().performers_isa().decode()


def available_isas() -> tuple[str, ...]:
    """The instruction sets of the library that this processor runs, best first."""
    return tuple(load().performers_available_isas().decode().split())


def _tell() -> None:
    global _told
    with _lock:
        if _told:
            return
        _told = True
    logging.getLogger("performers").warning("the native backend is not available: %s", _reason)
