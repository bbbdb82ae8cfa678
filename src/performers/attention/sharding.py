"""The sequence-parallel context that `favor_attention` runs in, per thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.features import FeatureMap


class Sharding(Protocol):
    """Attention of one row whose positions are spread over processes."""

    def attend(self, call: AttentionCall, backend: str | None) -> Tensor:
        """The output ``(batch, key_heads, groups, L, value_dim)`` for an unchecked local call."""


# Per thread, as `use_backend` is; and all of them, for the threads of autograd.
_thread = threading.local()
_entered: list[Sharding] = []
# Feature maps whose last forward pass ran in a context.
_used: WeakSet[FeatureMap] = WeakSet()


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
    sharding: Sharding | None = getattr(_thread, "sharding", None)
    if sharding is not None or not _entered:
        return sharding
    # On a GPU a checkpoint is computed again by a thread of autograd, which entered no context.
    return _entered[-1] if torch._C._current_graph_task_id() != -1 else None


def sharding_of_call(call: AttentionCall) -> Sharding | None:
    """The context that a call runs in, or None.

    Raises:
        RuntimeError: A backward pass outside the context computes a call again that ran in it.
    """
    sharding, features = current_sharding(), call.feature_map
    if torch.compiler.is_compiling() or not isinstance(features, FeatureMap):
        return sharding
    if torch._C._current_graph_task_id() == -1:
        if sharding is not None:
            _used.add(features)
        elif _used:
            _used.discard(features)
    elif sharding is None and features in _used:
        raise RuntimeError(
            "a backward pass computes attention again (a checkpoint or a reversible block) outside "
            "performers.distributed.sequence_parallel, where its forward pass ran: call backward() "
            "inside the context"
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
