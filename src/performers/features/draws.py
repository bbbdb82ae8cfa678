"""Detection of features that change between a forward pass and its recomputation.

``torch.utils.checkpoint`` calls a function again in the backward pass, with whatever state its
modules have by then. Features that were redrawn, fitted or loaded in between would give gradients
of another function than the one that was computed.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_numbers = itertools.count()


class Drawn(nn.Module):
    """A module whose buffers are drawn or fitted, and change between calls only as a whole."""

    # Of modules that an older version has pickled.
    _draw_number: int = -1
    _last_used: int = -1

    def __init__(self) -> None:
        super().__init__()
        self._draw_number = next(_numbers)
        self._last_used = self._draw_number

    def _changed(self) -> None:
        """Note that buffers have got other values."""
        self._draw_number = next(_numbers)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._changed()
        super()._load_from_state_dict(*args, **kwargs)


class _SameDraw(torch.autograd.Function):
    """The identity, and in the backward pass a comparison of the numbers of two forward passes.

    The context keeps the numbers of the pass whose graph this is. Those among the saved tensors
    are the same, or under a checkpoint those of the recomputation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: list[int]) -> Tensor:
        ctx.numbers = numbers
        ctx.save_for_backward(torch.tensor(numbers, device="cpu"))
        # Not a view: changes of x in place stay the error that they are without this.
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (recomputed,) = ctx.saved_tensors
        if recomputed.tolist() != ctx.numbers:
            raise _redrawn()
        return grads[0], None


def with_same_draws(tensors: tuple[Tensor, ...], *modules: Drawn) -> tuple[Tensor, ...]:
    """The tensors, in a graph whose backward pass fails if the modules are others by then.

    Only a recomputation meets other modules: a graph that was kept has copies of what they held.
    Under ``torch.compile`` nothing is compared.

    Args:
        tensors: Inputs of a computation.
        modules: What it takes its features from.

    Raises:
        RuntimeError: This is a recomputation, and a module has changed since its last forward pass.
    """
    if torch.compiler.is_compiling():
        return tensors
    numbers = [module._draw_number for module in modules]
    if torch._C._current_graph_task_id() == -1:
        for module, number in zip(modules, numbers, strict=True):
            module._last_used = number
    elif torch.is_grad_enabled() and numbers != [module._last_used for module in modules]:
        # A backward pass runs this. With use_reentrant=True the forward pass has left no graph.
        raise _redrawn()
    if not torch.is_grad_enabled() or is_traced() or is_transformed():
        return tensors
    wanting = [index for index, x in enumerate(tensors) if x.requires_grad]
    # One is enough: its gradient is computed from all that the modules gave.
    return tuple(
        _SameDraw.apply(x, numbers) if [index] == wanting[:1] else x
        for index, x in enumerate(tensors)
    )


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` is recording."""
    return torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is active."""
    # There is no public way to ask.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _redrawn() -> RuntimeError:
    return RuntimeError(
        "the features changed (redraw_, calibrate_ or load_state_dict) between a checkpointed "
        "forward pass and its backward pass, which computes it again: the gradient would belong to "
        "other features; change them after backward(), before the next forward pass"
    )
