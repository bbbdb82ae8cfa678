"""What one attention call is measured on: its shapes, its dtype, its random inputs."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from performers.features import FeatureMap, GeneralizedFeatures, SoftmaxFeatures

FEATURES = ("softmax", "relu")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DIRECTIONS = ("bidirectional", "causal")
PASSES = ("forward", "forward+backward")


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
class Workload:
    """The shapes of an attention call, all but its length.

    Attributes:
        batch: Sequences in a call.
        heads: Attention heads.
        head_dim: Length of a query, key or value vector.
        num_features: Random features per head.
        features: ``"softmax"`` or ``"relu"``.
        dtype: A key of ``DTYPES``.
        seed: Of inputs and projections.
    """

    batch: int = 1
    heads: int = 8
    head_dim: int = 64
    num_features: int = 256
    features: str = "softmax"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: An option is out of range or unknown; the message names it.
        """
        for name in ("batch", "heads", "head_dim", "num_features"):
            at_least(name, getattr(self, name), 1)
        one_of("features", self.features, FEATURES)
        one_of("dtype", self.dtype, tuple(DTYPES))
        at_least("seed", self.seed, 0)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values."""
        return DTYPES[self.dtype]

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


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an unknown choice.

    Raises:
        ValueError: It is unknown; the message gives the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def rising(name: str, values: tuple[int, ...]) -> None:
    """Refuse lengths that are not positive and rising.

    Raises:
        ValueError: They are not, or there are none.
    """
    if not values or values[0] < 1 or any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"{name} must be positive and rise, got {list(values)}")


def subset_of(name: str, values: tuple[str, ...], choices: tuple[str, ...]) -> None:
    """Refuse a list that is empty, repeats itself or holds an unknown choice.

    Raises:
        ValueError: It does; the message gives the choices.
    """
    for value in values:
        one_of(name, value, choices)
    if not values or len(set(values)) < len(values):
        raise ValueError(
            f"{name} must name each of {', '.join(choices)} at most once and one at least, "
            f"got {list(values)}"
        )
