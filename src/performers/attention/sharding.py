"""The sequence-parallel context that `favor_attention` runs in, per thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from performers.attention.call import AttentionCall


class Sharding(Protocol):
    """Attention of one row whose positions are spread over processes."""

    def attend(self, call: AttentionCall, backend: str | None) -> Tensor:
        """The output ``(batch, key_heads, groups, L, value_dim)`` for an unchecked local call."""


# Per thread, as `use_backend` is; and all of them, for the threads of autograd.
_thread = threading.local()
_entered: list[Sharding] = []


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
