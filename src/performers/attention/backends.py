"""Which implementations exist, which are usable here, and which one to call."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from performers.attention import chunked, reference
from performers.attention.native import backend as native
from performers.attention.native import library
from performers.attention.problem import AttentionProblem
from performers.attention.state import FavorState
from performers.features.draws import is_traced

Backend = Callable[[AttentionProblem], tuple[Tensor, FavorState | None]]

_BACKENDS: dict[str, Backend] = {
    "native": native.attend,
    "torch": chunked.attend,
    "reference": reference.attend,
}
# Per thread; torch.compile can read a thread's attribute, but not a context variable.
_forced = threading.local()


def backends() -> tuple[str, ...]:
    """The backends usable here, best first."""
    return tuple(name for name in _BACKENDS if name != "native" or library.available())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every call inside the ``with`` block that does not name its own.

    Args:
        name: One of ``backends()``.

    Raises:
        ValueError: The backend is unknown or not usable here.

    Example:
        >>> with use_backend("reference"):
        ...     pass
    """
    resolve_backend(name)
    outer = getattr(_forced, "name", None)
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = outer


def resolve_backend(name: str | None) -> Backend:
    """The function of a named backend; of the innermost ``use_backend``, or the best, for None.

    The best is ``native`` where its library is available, and ``torch`` elsewhere and during an
    ONNX export: the operators of ``native`` can be compiled, and exported by ``torch.export``, but
    have no translation to ONNX.

    Raises:
        ValueError: The backend is unknown or not usable here.
    """
    if name is None:
        name = getattr(_forced, "name", None)
    if name is None:
        return _BACKENDS["native" if library.available() and not _exports_onnx() else "torch"]
    if name not in backends():
        raise ValueError(f"backend must be one of {backends()} here, got {name!r}")
    if name == "native" and _exports_onnx():
        raise ValueError(
            "backend must be 'torch' during an ONNX export, got 'native', whose operators have no "
            'translation to ONNX; pass backend=None or "torch", and export outside '
            'performers.use_backend("native")'
        )
    return _BACKENDS[name]


def _exports_onnx() -> bool:
    """Return True inside ``torch.onnx.export``."""
    # The first two are cheap; the last one imports modules when it is first called.
    return (torch.compiler.is_exporting() or is_traced()) and torch.onnx.is_in_onnx_export()


# torch.compile reads is_in_onnx_export() as False, though the exporter may call torch.compile. This
# is what torch.compiler.assume_constant_result does, which would import the compiler.
_exports_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]
