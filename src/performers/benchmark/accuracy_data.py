"""Gaussian queries, keys and values, on which the estimators' errors are compared."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianData:
    """Queries and keys with the scale of the scores in them, ``x' = sqrt(scale) x``, and values.

    Attributes:
        name: What tables call it.
        length: Queries and keys in a sample.
        head_dim: Length of a vector.
        norm: ``E |x'|^2`` of queries and keys. Vectors of N(0, I) and the usual scale have
            ``sqrt(head_dim)``.
        is_isotropic: Whether all directions are alike; else the eigenvalues of the covariance are
            in proportion to ``1, 1/2, 1/3, ...``.
    """

    name: str
    length: int
    head_dim: int
    norm: float
    is_isotropic: bool

    def sample(self, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, ...]:
        """Query, key and value, each of shape ``(length, head_dim)``, float32.

        Args:
            generator: Source of randomness.
            length: Vectors of each; ``self.length`` when None.

        Returns:
            The three; values are N(0, I).
        """
        shape = (length or self.length, self.head_dim)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        eigenvalues = torch.ones(self.head_dim)
        if not self.is_isotropic:
            eigenvalues = 1 / torch.arange(1, self.head_dim + 1)
        width = (eigenvalues / eigenvalues.sum() * self.norm).sqrt()
        return query * width, key * width, value
