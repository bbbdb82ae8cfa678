"""Detection of features that change between a forward pass and its recomputation.

``torch.utils.checkpoint`` calls a function again in the backward pass, with the modules as they are
by then. Features that were redrawn, calibrated or loaded in between would give the gradient of
another function than the one that was computed.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_numbers = itertools.count()


class VersionedModule(nn.Module):
    """A module whose buffers change only as a whole, with a number for their present values."""

    # Defaults for modules that an older version has pickled.
    _buffers_version: int = -1
    _last_used_version: int = -1

    def __init__(self) -> None:
        super().__init__()
        self._buffers_version = self._last_used_version = next(_numbers)

    @property
    def version(self) -> int:
        """Number of the present values of the buffers."""
        return self._buffers_version

    def _changed(self) -> None:
        """Give changed buffers a new version."""
        self._buffers_version = next(_numbers)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._changed()
        super()._load_from_state_dict(*args, **kwargs)


class _SameVersions(torch.autograd.Function):
    """The identity; its backward pass compares versions with those of the forward pass.

    The context keeps the versions of the pass that built the graph. The saved tensor has the same
    ones, or under a checkpoint those of the recomputation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, versions: list[int]) -> Tensor:
        ctx.versions = versions
        ctx.save_for_backward(torch.tensor(versions, device="cpu"))
        # Not a view: changing x in place stays an error.
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (recomputed,) = ctx.saved_tensors
        if recomputed.tolist() != ctx.versions:
            raise _features_changed()
        return grads[0], None


def guard_recomputation(
    tensors: tuple[Tensor, ...], *modules: VersionedModule
) -> tuple[Tensor, ...]:
    """Return the tensors, with a check that a recomputation uses the same features.

    Only a recomputation can see other features: a kept graph has copies of them. Nothing is checked
    under ``torch.compile``.

    Raises:
        RuntimeError: This is a recomputation, and a module has changed since its last forward pass.
    """
    if torch.compiler.is_compiling():
        return tensors
    versions = [module._buffers_version for module in modules]
    if torch._C._current_graph_task_id() == -1:
        for module, version in zip(modules, versions, strict=True):
            module._last_used_version = version
    elif torch.is_grad_enabled() and versions != [m._last_used_version for m in modules]:
        # Called by a backward pass. With use_reentrant=True the forward pass has left no graph.
        raise _features_changed()
    if not torch.is_grad_enabled() or is_traced() or is_transformed():
        return tensors
    # One input is enough: its gradient depends on the features of all modules.
    first = next((index for index, x in enumerate(tensors) if x.requires_grad), None)
    return tuple(
        _SameVersions.apply(x, versions) if index == first else x for index, x in enumerate(tensors)
    )


def is_traced() -> bool:
    """Return True if ``torch.jit.trace`` is recording."""
    return torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Return True in a transform of ``torch.func`` or forward-mode differentiation."""
    # There is no public query.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _features_changed() -> RuntimeError:
    return RuntimeError(
        "the features changed (redraw_, calibrate_ or load_state_dict) between a checkpointed "
        "forward pass and its backward pass, which computes it again: the gradient would belong to "
        "other features; change them after backward(), before the next forward pass"
    )
