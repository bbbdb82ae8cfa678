"""Reversible residual blocks (Gomez et al. 2017, arXiv 1707.04585; Kitaev et al. 2020).

Two streams ``x1, x2`` run through the blocks: ``y1 = x1 + F(x2)`` and ``y2 = x2 + G(y1)``. From a
block's outputs its inputs follow, ``x2 = y2 - G(y1)`` and ``x1 = y1 - F(x2)``, so the backward pass
computes activations again, block by block from the last, and none but the last are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from performers.features import FeatureMap
from performers.features.precision import without_autocast
from performers.models.context import AttentionContext
from performers.models.replay import BranchState, autocast_as, random_state_kept, without_hooks

Branch = Callable[[Tensor, AttentionContext], Tensor]


def run_reversible(
    blocks: Iterable[Any],
    hidden_states: Tensor,
    context: AttentionContext,
    *,
    keep_hidden_states: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run blocks on two copies of the hidden states, and average what comes out.

    The sums are kept in float32 at least. Gradients need the activations of one block at a time,
    and are exact up to the rounding of the sums: a branch much larger than its stream takes digits
    from it. For each block are kept the states of the random number generators and what it chose,
    such as the buckets of ``lsh``, which rounding would change. The gradients of all parameters of
    all blocks are held at once, and reach the parameters together when the first block is done.
    Until then parameters, features and modes (``train()``, ``eval()``) must stay as they were.

    A call with a cache, attention matrices or hidden states keeps the activations of all blocks, as
    an ordinary model does; any other with gradients is a graph break to ``torch.compile``.

    The two branches of a block are called, and never the block: what hooks on it would do does not
    happen. Hooks on modules inside run, once more in the backward pass.

    Args:
        blocks: Modules with the two branches ``attend`` and ``feed_forward`` of
            ``PerformerBlock``.
        hidden_states: Shape ``(B, L, hidden_size)``.
        context: Of the call.
        keep_hidden_states: Also return the mean of the streams before each block.

    Returns:
        The mean of the streams, of the shape and dtype of ``hidden_states``; the means before each
        block; the attention matrices.

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
        first, second = _remembering_nothing(blocks, wide, context, dtype)
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
    """Refuse blocks that something is to be done to whenever they are called.

    Raises:
        ValueError: There is one.
    """
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
        # Only distributed tensors have one; their class need not be there to import.
        if any(hasattr(parameter, "device_mesh") for parameter in block.parameters()):
            raise ValueError(
                f"parameters of block {number} are distributed tensors, which reversible=True does "
                "not gather: shard the whole model and not its blocks, or use reversible=False"
            )


@torch.compiler.disable
def _remembering_nothing(
    blocks: Sequence[Any], wide: Tensor, context: AttentionContext, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    steps = _Steps(blocks, context, dtype)
    first, second = _Reversible.apply(steps, wide, *(p for block in steps.trained for p in block))
    return first, second


class _Steps:
    """The branches of all blocks, in order, and what it takes to compute them once more."""

    def __init__(
        self, blocks: Sequence[Any], context: AttentionContext, dtype: torch.dtype
    ) -> None:
        self.blocks = blocks
        self.context = context
        self.dtype = dtype
        self.trained = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
        self.found = self.tensors()
        self.modes = _modes(blocks)
        self.states: list[BranchState] = []

    def tensors(self) -> list[Tensor]:
        """What the branches depend on besides their inputs: parameters, and random features."""
        found: list[Tensor] = []
        for block in self.blocks:
            found.extend(block.parameters())
            for module in block.modules():
                if isinstance(module, FeatureMap):
                    found.extend(module.buffers())
        return found

    def check_unchanged(self) -> None:
        """Refuse to compute blocks again that are not the ones they were.

        What was changed in place autograd finds when it unpacks the saved tensors.

        Raises:
            RuntimeError: Tensors were replaced, or ``train()`` or ``eval()`` called.
        """
        found = self.tensors()
        if len(found) != len(self.found) or any(
            one is not other for one, other in zip(found, self.found, strict=True)
        ):
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

    def branches(self, block: Any) -> tuple[Branch, Branch]:
        """Both branches of a block; streams are given to them in the model's dtype."""
        return (
            lambda x, context: block.attend(x.to(self.dtype), context)[0],
            lambda x, context: block.feed_forward(x.to(self.dtype)),
        )

    def compute(self, branch: Branch, x: Tensor) -> Tensor:
        """A branch for the first time."""
        state = BranchState(x)
        self.states.append(state)
        with autocast_as(state):
            return branch(x, self.context._replace(choices=state.choices))

    def repeat(
        self,
        state: BranchState,
        branch: Branch,
        x: Tensor,
        gradient: Tensor,
        trained: list[nn.Parameter],
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """A branch once more, with the randomness it had, and its gradients.

        Args:
            state: When it was first computed.
            branch: ``f``.
            x: Its input.
            gradient: Of its output.
            trained: Parameters of its block.

        Returns:
            ``f(x)`` without history, and the gradients of ``x`` and of the parameters.
        """
        state.restore()
        x = x.detach().requires_grad_()
        with torch.enable_grad(), autocast_as(state):
            out = branch(x, self.context._replace(choices=state.choices))
        if not out.requires_grad:
            return out, None, [None] * len(trained)
        with without_hooks(trained):
            found = torch.autograd.grad(
                out, (x, *trained), gradient.to(out.dtype), allow_unused=True
            )
        return out.detach(), found[0], list(found[1:])


def _modes(blocks: Iterable[Any]) -> list[bool]:
    return [module.training for block in blocks for module in block.modules()]


class _Reversible(torch.autograd.Function):
    """All blocks as one function of the hidden states and the parameters."""

    @staticmethod
    def forward(ctx: Any, steps: _Steps, wide: Tensor, *trained: Tensor) -> tuple[Tensor, Tensor]:
        first = second = wide
        for block in steps.blocks:
            attend, feed_forward = steps.branches(block)
            first = first + steps.compute(attend, second)
            second = second + steps.compute(feed_forward, first)
        ctx.steps = steps
        # The others are at hand anyway, but autograd checks that they are not changed.
        ctx.save_for_backward(first, second, *steps.found)
        return first, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps: _Steps = ctx.steps
        first, second, *_ = ctx.saved_tensors
        steps.check_unchanged()
        upper, lower = gradients
        states = reversed(steps.states)
        collected: list[list[Tensor | None]] = []
        with random_state_kept(first), without_autocast(first.device):
            for block, trained in zip(reversed(steps.blocks), reversed(steps.trained), strict=True):
                attend, feed_forward = steps.branches(block)
                out, change, found = steps.repeat(next(states), feed_forward, first, lower, trained)
                second = second - out
                upper = upper if change is None else upper + change
                out, change, also = steps.repeat(next(states), attend, second, upper, trained)
                first = first - out
                lower = lower if change is None else lower + change
                collected.append([_sum(a, b) for a, b in zip(found, also, strict=True)])
        of_parameters = [gradient for block in reversed(collected) for gradient in block]
        return None, upper + lower, *of_parameters


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
