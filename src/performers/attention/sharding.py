"""The sequence-parallel context that `favor_attention` runs in, per thread."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.features import FeatureMap


class Sharding(Protocol):
    """Attention of one row whose positions are spread over processes."""

    @property
    def row(self) -> Hashable:
        """The processes and the sequences of the row, equal where a call gives the same output."""

    def attend(self, call: AttentionCall, backend: str | None) -> Tensor:
        """The output ``(batch, key_heads, groups, L, value_dim)`` for an unchecked local call."""

    def tell_positions(self, position_ids: Tensor) -> None:
        """Take the positions, without padding, that the next calls of a model are for."""


# Per thread, as `use_backend` is; and all of them, for the threads of autograd.
_thread = threading.local()
_entered: list[Sharding] = []
# Rows of the feature maps whose last forward pass ran in a context.
_used: WeakKeyDictionary[FeatureMap, Hashable] = WeakKeyDictionary()


@contextmanager
def sharded(sharding: Sharding) -> Iterator[None]:
    """Let ``sharding`` compute every call of ``favor_attention`` inside the ``with`` block."""
    outer = getattr(_thread, "sharding", None)
    _thread.sharding = sharding
    _entered.append(sharding)
    try:
        yield
    finally:
        _thread.sharding = outer
        _entered.remove(sharding)


def current_sharding() -> Sharding | None:
    """The innermost context of this thread, or None."""
    return next(iter(_contexts()), None)


def _contexts() -> list[Sharding]:
    """The contexts that a call may belong to, innermost first."""
    sharding: Sharding | None = getattr(_thread, "sharding", None)
    if sharding is not None:
        return [sharding]
    # On a GPU a checkpoint is computed again by a thread of autograd, which entered no context.
    return _entered[::-1] if _entered and torch._C._current_graph_task_id() != -1 else []


def sharding_of_call(call: AttentionCall) -> Sharding | None:
    """The context that a call runs in, or None.

    Raises:
        RuntimeError: A backward pass computes a call again that ran in a context, and is outside
            it or inside that of another row.
    """
    sharding, features = current_sharding(), call.feature_map
    if torch.compiler.is_compiling() or not isinstance(features, FeatureMap):
        return sharding
    if torch._C._current_graph_task_id() == -1:
        if sharding is not None:
            _used[features] = sharding.row
        elif _used:
            _used.pop(features, None)
    elif features in _used:
        row = _used[features]
        sharding = next((context for context in _contexts() if context.row == row), None)
        if sharding is None:
            raise RuntimeError(
                "a backward pass computes attention again (a checkpoint or a reversible block) "
                "outside performers.distributed.sequence_parallel, where its forward pass ran, or "
                "with another group or cu_seqlens: call backward() inside the context"
            )
    return sharding


def check_not_sharded(name: str) -> None:
    """Refuse a computation that would see the shard of one process as the whole row.

    Raises:
        ValueError: A sequence-parallel context is active.
    """
    if current_sharding() is not None:
        raise ValueError(
            f"{name} inside performers.distributed.sequence_parallel would take this process's "
            "shard for the whole row: call it outside the context, on whole rows"
        )
