"""Settings of a conversion."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from performers.nn import Approximation, FavorAttention
from performers.nn.approximation import as_integer

FAVOR = "favor"
"""Submodule of a converted attention module; None marks a layer that stays exact."""

LEAVE_EXACT = "leave it exact with to_performer(..., layers=...)"
"""Remedy of all refusals of a layer."""

# Lists of keys per head: of 128 keys each, 32 left embeddings of all-MiniLM-L6-v2 at a cosine of
# 0.9980 to the original's, 16 at 0.9976.
_LISTS = 32
Item = TypeVar("Item")


@dataclass(frozen=True)
class Conversion(Approximation):
    """An approximation, and the layers of a model that it is for.

    Attributes:
        layers: Indices of the attention layers that become linear; None: all.
        cross_attention: Whether attention from a decoder to an encoder becomes linear too.
        learned: Whether the features are trained parameters, as ``distill`` leaves them.
    """

    layers: tuple[int, ...] | None = None
    cross_attention: bool = False
    learned: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            layers = tuple(map(as_integer, self.layers))
            if not layers or None in layers:
                raise ValueError(
                    "layers must be None (all) or the indices of the layers to make linear, at "
                    f"least one, got {self.layers}"
                )
            object.__setattr__(self, "layers", layers)

    @property
    def needs_samples(self) -> bool:
        """True if the estimator or lists of keys are fitted to samples."""
        return self.is_calibrated or self.listed_keys > 0

    def choose(self, items: Sequence[Item]) -> list[Item]:
        """Select the layers of a model that become linear."""
        count = len(items)
        if outside := [x for x in self.layers or () if not -count <= x < count]:
            raise ValueError(
                f"layers must be in 0..{count - 1}, the model's {count} attention layers, "
                f"got {outside}"
            )
        chosen = range(count) if self.layers is None else {x % count for x in self.layers}
        return [item for index, item in enumerate(items) if index in chosen]

    def attention(
        self, head_dim: int, num_heads: int, *, is_cross: bool, generator: torch.Generator | None
    ) -> FavorAttention:
        """Build the attention of one layer, with features alone where it is cross-attention."""
        favor = self.build(head_dim, num_heads, num_lists=_LISTS, generator=generator)
        if is_cross:
            favor.window, favor.sinks = None, 0
        return favor


def converted_modules(model: nn.Module) -> dict[nn.Module, FavorAttention]:
    """Find the attention modules of a transformers model that are linear, with their attention."""
    found = {module: getattr(module, FAVOR, None) for module in model.modules()}
    return {module: favor for module, favor in found.items() if isinstance(favor, FavorAttention)}
