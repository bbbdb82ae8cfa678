"""Unbiased random features of the softmax kernel ``exp(q . k)``."""

from typing import Literal, get_args

import torch

from performers.features.base import FeatureMap, default_num_features
from performers.features.form import FeatureForm
from performers.features.projections import PROJECTIONS, Projection

Estimator = Literal["positive", "hyperbolic", "trigonometric"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


class SoftmaxFeatures(FeatureMap):
    """FAVOR+ and its relatives: features whose inner products estimate ``exp(scale * q . k)``.

    With ``x' = sqrt(scale) x``, ``w_i`` the rows of the projection and ``m = num_features``:

    * ``positive``: ``phi(x) = exp(w_i . x' - |x'|^2 / 2) / sqrt(m)``, ``m`` draws.
    * ``hyperbolic``: the same with rows ``w_i`` and ``-w_i``, ``m / 2`` draws.
    * ``trigonometric``: ``exp(|x'|^2 / 2) (sin w_i . x', cos w_i . x') sqrt(2 / m)``, ``m / 2``
      draws. Not positive: normalisers can come close to zero.

    All are unbiased for Gaussian and orthogonal rows. ``regularized=True`` (SMREG) fixes the row
    lengths at ``sqrt(head_dim)``: less variance, biased low by a factor that tends to one as
    ``head_dim`` grows. Source: Choromanski et al. 2021 (arXiv 2009.14794), Lemmas 1 and 2,
    sections 2.4 and 3.

    Args:
        head_dim: Length of a query or key vector.
        num_features: Length ``m`` of ``phi(x)``; by default the multiple of 32 nearest
            ``head_dim * ln(head_dim)``, at least 32. Even for the two-sided estimators.
        estimator: One of the three above.
        projection: ``"orthogonal"`` (blocks of ``head_dim`` orthogonal rows) or ``"gaussian"``.
        regularized: SMREG.
        num_heads: Draw a projection per head; None shares one.
        generator: Source of randomness; torch's default generator when None.

    Raises:
        ValueError: An argument is out of range or unknown.

    Example:
        >>> features = SoftmaxFeatures(64, 256)
        >>> features.estimate_kernel(torch.randn(10, 64), torch.randn(12, 64)).shape
        torch.Size([10, 12])
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int | None = None,
        *,
        estimator: Estimator = "positive",
        projection: Projection = "orthogonal",
        regularized: bool = False,
        num_heads: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
        if num_features is None:
            num_features = default_num_features(head_dim)
        two_sided = estimator != "positive"
        if num_features < 1 or (two_sided and num_features % 2):
            wanted = "a positive even number" if two_sided else "at least 1"
            raise ValueError(
                f"num_features must be {wanted} for the {estimator} estimator, got {num_features}"
            )
        self.estimator = estimator
        super().__init__(
            head_dim,
            num_features,
            num_rows=num_features // 2 if two_sided else num_features,
            projection=projection,
            regularized=regularized,
            num_heads=num_heads,
            generator=generator,
        )

    def form(self) -> FeatureForm:
        """The record that attention backends evaluate."""
        weight = self.weight
        assert weight is not None
        if self.estimator == "trigonometric":
            return FeatureForm("trigonometric", weight, None, self.num_features, 1 / self._num_rows)
        if self.estimator == "hyperbolic":
            weight = torch.cat((weight, -weight), dim=-2)
        return FeatureForm("exponential", weight, None, self.num_features, 1 / self.num_features)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        regularized = ", regularized=True" if self.regularized else ""
        return f"{super().extra_repr()}, estimator={self.estimator!r}{regularized}"
