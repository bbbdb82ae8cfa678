"""Implementations: those that exist, those that are usable, and the choice for a call."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import NamedTuple

from torch import Tensor

from performers.attention import reference
from performers.attention.call import AttentionCall
from performers.attention.native import backend as native
from performers.attention.native import library
from performers.attention.state import FavorState
from performers.attention.torch_backend import backend as torch_backend
from performers.attention.torch_backend.blocks import Rows
from performers.attention.triton import backend as triton


class Backend(NamedTuple):
    """An implementation of attention.

    Attributes:
        attend: From a checked call to the output ``(batch, key_heads, groups, L, value_dim)`` in
            the call's dtype or that of its inputs, and the sums that a later call continues from,
            when asked for.
        attend_part: The same rows before they are divided, which those of other keys can be added
            to; only for calls with ``is_part``.
        uncovered: What keeps it from computing a call, as "for float64 inputs"; None when it can.
    """

    attend: Callable[[AttentionCall], tuple[Tensor, FavorState | None]]
    attend_part: Callable[[AttentionCall], Rows] | None = None
    uncovered: Callable[[AttentionCall], str | None] = lambda call: None


_BACKENDS = {
    "native": Backend(native.attend, native.attend_part, native.uncovered),
    "triton": Backend(triton.attend, uncovered=triton.uncovered),
    "torch": Backend(torch_backend.attend, torch_backend.attend_part),
    "reference": Backend(reference.attend),
}
_USABLE = {"native": library.available, "triton": triton.available}
# Arguments that not all backends compute, their defaults, and the backends that do.
_COMPUTED_BY = [(x.name, x.default, x.metadata) for x in fields(AttentionCall) if x.metadata]
# Per thread; torch.compile can read a thread's attribute, but not a context variable.
_forced = threading.local()


def backends() -> tuple[str, ...]:
    """The backends usable here, best first."""
    return tuple(filter(_is_usable, _BACKENDS))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every call inside the ``with`` block that does not name its own.

    Args:
        name: One of ``backends()``. Calls that it does not cover raise ``ValueError``.

    Raises:
        ValueError: The backend is unknown or not usable here.

    Example:
        >>> with use_backend("reference"):
        ...     pass
    """
    _check_name(name)
    outer = getattr(_forced, "name", None)
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = outer


def resolve_backend(name: str | None, call: AttentionCall) -> Backend:
    """The backend of a name; that of the innermost ``use_backend``, or the best, for None.

    The best is the first of ``backends()`` that covers the call, so the device of the call decides
    between ``native`` and ``triton``.

    Raises:
        ValueError: The backend is unknown, not usable here, or does not cover the call.
    """
    if name is None:
        name = getattr(_forced, "name", None)
    if name is None:
        return _BACKENDS[_best(call)]
    _check_name(name)
    uncovered = _uncovered(name, call)
    if uncovered is not None:
        best = _best(call)
        raise ValueError(
            f"backend must be {best!r} {uncovered}, got {name!r}, which does not cover it; "
            f'pass backend=None or "{best}", outside performers.use_backend("{name}")'
        )
    return _BACKENDS[name]


def _best(call: AttentionCall) -> str:
    reasons = []
    for name in _BACKENDS:
        usable = _is_usable(name)
        uncovered = _uncovered(name, call) if usable else None
        if usable and uncovered is None:
            return name
        if name == "triton" and call.query.device.type == "cuda":
            triton.tell_unused(uncovered)
        reasons.append(f"{name} {uncovered or 'is not usable here'}")
    raise ValueError(f"no backend covers this call: not {', not '.join(reasons)}")


def _uncovered(name: str, call: AttentionCall) -> str | None:
    """Reason why a backend cannot compute a call, or None."""
    for argument, default, declared in _COMPUTED_BY:
        value = getattr(call, argument)
        # Tensors are not compared: they have no default but None.
        used = value is not None if default is None else value != default
        if used and name not in declared["backends"]:
            reason: str = declared["otherwise"]
            return reason
    return _BACKENDS[name].uncovered(call)


def _is_usable(name: str) -> bool:
    usable = _USABLE.get(name)
    return usable is None or usable()


def _check_name(name: str) -> None:
    if name not in backends():
        raise ValueError(f"backend must be one of {backends()} here, got {name!r}")
