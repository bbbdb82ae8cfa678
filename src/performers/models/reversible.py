"""Reversible residual blocks (Gomez et al. 2017, arXiv 1707.04585; Kitaev et al. 2020).

Two streams ``x1, x2`` run through the blocks: ``y1 = x1 + F(x2)`` and ``y2 = x2 + G(y1)``. From a
block's outputs its inputs follow, ``x2 = y2 - G(y1)`` and ``x1 = y1 - F(x2)``, so the backward pass
recomputes activations block by block, from the last, and only those of the last are saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from performers.features import FeatureMap
from performers.features.precision import without_autocast
from performers.models.context import AttentionContext


def run_reversible(
    blocks: Iterable[Any],
    hidden_states: Tensor,
    context: AttentionContext,
    *,
    keep_hidden_states: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run blocks on two copies of the hidden states and average the outputs.

    The streams are kept in float32 at least. Gradients need the activations of one block at a time
    and are exact up to the rounding of the sums, which costs digits where a branch is much larger
    than its stream. Saved for each block are the states of the random number generators and its
    choices, such as the buckets of ``lsh``, which rounding would change. The gradients of all
    parameters of all blocks are held at once and reach the parameters together, when the first
    block is done. Until then parameters, features and modes (``train()``, ``eval()``) must not
    change.

    A call with a cache, attention matrices or hidden states saves the activations of all blocks,
    as an ordinary model does; any other with gradients is a graph break to ``torch.compile``.

    The two branches of a block are called, and never the block itself, whose hooks would not run.
    Hooks on modules inside run, and again in the backward pass.

    Args:
        blocks: Modules with the two branches ``attend`` and ``feed_forward`` of
            ``PerformerBlock``.
        hidden_states: Shape ``(B, L, hidden_size)``.
        context: Context of the call.
        keep_hidden_states: Also return the mean of the streams before each block.

    Returns:
        The mean of the streams, like ``hidden_states``; the means before each block; the attention
        matrices.

    Raises:
        ValueError: A block has hooks, or weights that only its hooks could gather.
        RuntimeError: In the backward pass: parameters, features or modes have changed.
    """
    blocks = list(blocks)
    _check_hooks(blocks)
    dtype = hidden_states.dtype
    wide = hidden_states.to(torch.promote_types(dtype, torch.float32))
    ordinary = keep_hidden_states or context.need_weights or context.cache is not None
    if torch.is_grad_enabled() and not ordinary:
        first, second = _run_recomputed(blocks, wide, context, dtype)
        return _mean(first, second, dtype), [], []
    first = second = wide
    before: list[Tensor] = []
    matrices: list[Tensor] = []
    for block in blocks:
        if keep_hidden_states:
            before.append(_mean(first, second, dtype))
        change, weights = block.attend(second.to(dtype), context)
        first = first + change
        second = second + block.feed_forward(first.to(dtype))
        if weights is not None:
            matrices.append(weights)
    return _mean(first, second, dtype), before, matrices


def _mean(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    return ((first + second) / 2).to(dtype)


def _check_hooks(blocks: Sequence[Any]) -> None:
    """Check that calling the branches of a block in its place leaves nothing out."""
    for number, block in enumerate(blocks):
        hooked = (
            block._forward_pre_hooks
            or block._forward_hooks
            or block._backward_pre_hooks
            or block._backward_hooks
            # As accelerate does to move weights.
            or "forward" in vars(block)
        )
        if hooked:
            raise ValueError(
                f"block {number} has hooks, which reversible=True would not run because it calls "
                "the two branches of a block and never the block: put them on modules inside or on "
                "the whole model (with FSDP, shard the whole model and not its blocks), read what "
                "comes before a block from output_hidden_states=True, or use reversible=False"
            )
        # Distributed tensors have this attribute; importing their class is not needed.
        if any(hasattr(parameter, "device_mesh") for parameter in block.parameters()):
            raise ValueError(
                f"parameters of block {number} are distributed tensors, which reversible=True does "
                "not gather: shard the whole model and not its blocks, or use reversible=False"
            )


@torch.compiler.disable
def _run_recomputed(
    blocks: Sequence[Any], wide: Tensor, context: AttentionContext, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    calls = _Calls(blocks, context, dtype)
    first, second = _Reversible.apply(calls, wide, *(p for block in calls.trained for p in block))
    return first, second


class _RandomState:
    """States of the random number generators of the CPU and of the device of a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.device_type = x.device.type
        self.of_cpu, self.of_devices = torch.get_rng_state(), get_device_states(x)

    def restore(self) -> None:
        torch.set_rng_state(self.of_cpu)
        set_device_states(*self.of_devices, device_type=self.device_type)


class _BranchCall:
    """A call of a branch that can be repeated with the same randomness, autocast and choices."""

    def __init__(self, branch: Callable[[Tensor, AttentionContext], Tensor]) -> None:
        self.branch = branch

    def compute(self, x: Tensor, context: AttentionContext) -> Tensor:
        # In evaluation too: a module inside may be in training.
        self.random = _RandomState(x)
        device = x.device.type
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if torch.amp.is_autocast_available(device):
            # Without the cache of weights: copies made while gradients are disabled have no
            # history, and the backward pass must not use them.
            self.autocast = partial(
                torch.autocast,
                device,
                cache_enabled=False,
                enabled=torch.is_autocast_enabled(device),
                dtype=torch.get_autocast_dtype(device),
            )
        self.context = context._replace(choices={})
        with self.autocast():
            return self.branch(x, self.context)

    def repeat(
        self, x: Tensor, gradient: Tensor, trained: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """Output without history, and the gradients of ``x`` and of the parameters of the block.

        ``gradient`` is that of the output.
        """
        self.random.restore()
        x = x.detach().requires_grad_()
        with torch.enable_grad(), self.autocast():
            out = self.branch(x, self.context)
        if not out.requires_grad:
            return out, None, [None] * len(trained)
        with _without_hooks(trained):
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                out, (x, *trained), gradient.to(out.dtype), allow_unused=True
            )
        return out.detach(), found[0], list(found[1:])


@contextmanager
def _without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Suspend hooks of parameters: gradients computed inside are parts of the final ones."""
    # Autograd and the handles of hooks refer to these very dictionaries.
    kept = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


class _Calls:
    """The two calls of each block, and the tensors and modes that they depend on."""

    def __init__(
        self, blocks: Sequence[Any], context: AttentionContext, dtype: torch.dtype
    ) -> None:
        self.blocks, self.context = blocks, context
        self.of_blocks = [_branches(block, dtype) for block in blocks]
        self.trained = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
        self.tensors = _tensors(blocks)
        self.modes = _modes(blocks)

    def check_unchanged(self) -> None:
        """Check that repeated calls are those of the forward pass.

        Autograd detects changes in place when it unpacks the saved tensors.
        """
        if [*map(id, self.tensors)] != [*map(id, _tensors(self.blocks))]:
            raise RuntimeError(
                "parameters or random features were replaced between the forward and the backward "
                "pass of reversible blocks, which need them once more: call backward() first"
            )
        if self.modes != _modes(self.blocks):
            raise RuntimeError(
                "train() or eval() was called between the forward and the backward pass of "
                "reversible blocks, which compute activations again and would now do so in "
                "another mode: call backward() first"
            )


def _branches(block: Any, dtype: torch.dtype) -> tuple[_BranchCall, _BranchCall]:
    return (
        _BranchCall(lambda x, context: block.attend(x.to(dtype), context)[0]),
        _BranchCall(lambda x, context: block.feed_forward(x.to(dtype))),
    )


def _tensors(blocks: Iterable[Any]) -> list[Tensor]:
    """Parameters and random features, on which the branches depend besides their inputs."""
    found: list[Tensor] = []
    for block in blocks:
        found.extend(block.parameters())
        for module in block.modules():
            if isinstance(module, FeatureMap):
                found.extend(module.buffers())
    return found


def _modes(blocks: Iterable[Any]) -> list[bool]:
    return [module.training for block in blocks for module in block.modules()]


class _Reversible(torch.autograd.Function):
    """All blocks as one function of the hidden states and the parameters."""

    @staticmethod
    def forward(ctx: Any, calls: _Calls, wide: Tensor, *trained: Tensor) -> tuple[Tensor, Tensor]:
        first = second = wide
        for attend, feed_forward in calls.of_blocks:
            first = first + attend.compute(second, calls.context)
            second = second + feed_forward.compute(first, calls.context)
        ctx.calls = calls
        # Parameters and features are saved for autograd to check that they do not change.
        ctx.save_for_backward(first, second, *calls.tensors)
        return first, second

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # ``once_differentiable`` would be left out of ``torch.autograd.grad``, which then ends
            # with wrong numbers in place of an error.
            raise NotImplementedError(
                "reversible blocks have no second derivative: leave out create_graph=True, or "
                "build the model with reversible=False"
            )
        calls: _Calls = ctx.calls
        first, second, *_ = ctx.saved_tensors
        calls.check_unchanged()
        upper, lower = gradients
        collected: list[list[Tensor | None]] = []
        random = _RandomState(first)
        try:
            with without_autocast(first.device):
                for (attend, feed_forward), trained in zip(
                    reversed(calls.of_blocks), reversed(calls.trained), strict=True
                ):
                    out, change, found = feed_forward.repeat(first, lower, trained)
                    second = second - out
                    upper = upper if change is None else upper + change
                    out, change, also = attend.repeat(second, upper, trained)
                    first = first - out
                    lower = lower if change is None else lower + change
                    collected.append([_sum(a, b) for a, b in zip(found, also, strict=True)])
        finally:
            random.restore()
        of_parameters = [gradient for block in reversed(collected) for gradient in block]
        return None, upper + lower, *of_parameters


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
