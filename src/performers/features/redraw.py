"""Redrawing of projections, at once or on a schedule of training steps."""

import hashlib

import torch
from torch import nn

from performers.features.base import FeatureMap


def redraw_features_(module: nn.Module, generator: torch.Generator | None = None) -> int:
    """Draw fresh projections, in place, for every feature map inside ``module``.

    Redraw between steps, after ``backward()``. Autograd keeps the draw of a forward pass, but
    ``torch.utils.checkpoint`` recomputes the pass with the new one: its backward pass then raises a
    RuntimeError. Two cases are not detected, and give a gradient of the wrong features: a function
    compiled as a whole and checkpointed from outside, and, with ``use_reentrant=True``, a pass
    that was followed by another one after the redraw.

    Weight averaging (EMA, SWA) must leave projections out: a mean of several draws is shorter than
    a draw, and the features become biased. ``torch.optim.swa_utils.AveragedModel`` copies them from
    the model unless it has ``use_buffers=True``; after an average that includes buffers, call this
    function on the averaged model.

    Args:
        module: Any module.
        generator: Source of randomness, consumed in the order of ``module.modules()``; torch's
            default generator when None. Processes that must agree pass generators in the same
            state.

    Returns:
        The number of feature maps redrawn.
    """
    maps = [child for child in module.modules() if isinstance(child, FeatureMap)]
    for feature_map in maps:
        feature_map.redraw_(generator)
    return len(maps)


class FeatureRedrawer:
    """Redraws a model's features every ``interval`` training steps.

    The projection after step ``n`` is a function of ``seed`` and ``n`` alone: resumed runs and
    several processes draw the same ones. Call ``step()`` once per optimizer step.

    Args:
        module: The model.
        interval: Optimizer steps between redraws; 0 never redraws.
        seed: Base of the generator's seeds.

    Raises:
        ValueError: ``interval`` is negative.
    """

    def __init__(self, module: nn.Module, interval: int, *, seed: int = 0) -> None:
        if interval < 0:
            raise ValueError(f"interval must be >= 0 steps (0 never redraws), got {interval}")
        self.module = module
        self.interval = interval
        self.seed = seed
        self.steps = 0

    def step(self, steps: int | None = None) -> bool:
        """Count one step and redraw when it is due; a module in eval mode is never redrawn.

        Args:
            steps: Number of steps so far, if the caller counts them; None counts here.

        Returns:
            Whether the features were redrawn.
        """
        self.steps = self.steps + 1 if steps is None else steps
        if not self.module.training or self.interval == 0 or self.steps % self.interval:
            return False
        # torch's CPU generator uses 32 bits of its seed.
        digest = hashlib.blake2b(f"{self.seed}:{self.steps}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        redraw_features_(self.module, generator)
        return True

    def state_dict(self) -> dict[str, int]:
        """The step count, for a resumed run."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from ``state_dict()``."""
        self.steps = state["steps"]
