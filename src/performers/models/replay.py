"""What it takes to compute a branch of a block once more in a backward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


class BranchState:
    """Random number generators and autocast as they were when a branch was first computed.

    Generators are kept in evaluation too: a module inside may be in training.

    Attributes:
        choices: What the branch chose, see ``AttentionContext``.
    """

    def __init__(self, x: Tensor) -> None:
        self.device_type = x.device.type
        self.autocast: dict[str, Any] | None = None
        if torch.amp.is_autocast_available(self.device_type):
            self.autocast = {
                "enabled": torch.is_autocast_enabled(self.device_type),
                "dtype": torch.get_autocast_dtype(self.device_type),
            }
        self.random = torch.get_rng_state(), get_device_states(x)
        self.choices: dict[nn.Module, Tensor] = {}

    def restore(self) -> None:
        """Set the generators back."""
        of_cpu, (devices, states) = self.random
        torch.set_rng_state(of_cpu)
        set_device_states(devices, states, device_type=self.device_type)


@contextmanager
def autocast_as(state: BranchState) -> Iterator[None]:
    """Autocast as in a state, without its cache.

    Copies of the weights that are made while no gradients are wanted have no history, and the
    backward pass must not find them.
    """
    if state.autocast is None:
        yield
        return
    with torch.autocast(state.device_type, cache_enabled=False, **state.autocast):
        yield


@contextmanager
def without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep what ``Parameter.register_hook`` registered from running.

    Gradients that are found inside are only parts, which reach the hooks when they are handed on.
    """
    # The dictionaries themselves are what autograd and the handles of hooks refer to.
    kept = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


@contextmanager
def random_state_kept(x: Tensor) -> Iterator[None]:
    """Leave the random number generators as they were found."""
    state = BranchState(x)
    try:
        yield
    finally:
        state.restore()
