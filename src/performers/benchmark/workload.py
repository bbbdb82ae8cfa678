"""What one attention call is measured on: its shapes, its dtype, its random inputs."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from performers.benchmark.settings import WorkloadSettings
from performers.features import FeatureMap, GeneralizedFeatures, SoftmaxFeatures


class Inputs(NamedTuple):
    """The tensors of one call, each of shape ``(batch, heads, length, head_dim)``.

    Attributes:
        query: Standard normal, as are the others.
        key: Likewise.
        value: Likewise.
        grad: Gradient of the output.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


@dataclass(frozen=True, kw_only=True)
class Workload(WorkloadSettings):
    """The shapes of an attention call, all but its length, and random inputs of them."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def inputs(self, length: int, *, requires_grad: bool = False) -> Inputs:
        """Random tensors, the same for the same seed and length.

        Args:
            length: Tokens in a sequence.
            requires_grad: Whether query, key and value take part in autograd.

        Returns:
            The tensors.
        """
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.heads, length, self.head_dim)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.torch_dtype)

        query, key, value = (draw().requires_grad_(requires_grad) for _ in range(3))
        return Inputs(query, key, value, draw())

    def feature_map(self) -> FeatureMap:
        """The random features, the same for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.features == "relu":
            return GeneralizedFeatures(
                self.head_dim, self.num_features, fn="relu", generator=generator
            )
        return SoftmaxFeatures(self.head_dim, self.num_features, generator=generator)


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a number that is too small, or not finite.

    Raises:
        ValueError: It is; the message gives its name.
    """
    if not value >= least or not math.isfinite(value):
        raise ValueError(f"{name} must be at least {least}, got {value}")


def rising(name: str, values: tuple[int, ...]) -> None:
    """Refuse lengths that are not positive and rising.

    Raises:
        ValueError: They are not, or there are none.
    """
    if not values or values[0] < 1 or any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"{name} must be positive and rise, got {list(values)}")
