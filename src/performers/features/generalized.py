"""Generalized attention: kernels ``K(q, k) = E[f(w . q) f(w . k)]`` for a chosen ``f``."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.features.base import FeatureMap, resolve_num_features
from performers.features.form import FeatureForm
from performers.features.projections import PROJECTIONS, Projection


def _elu_plus_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _identity(x: Tensor) -> Tensor:
    return x


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "elu+1": _elu_plus_one,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "identity": _identity,
}


class GeneralizedFeatures(FeatureMap):
    """``phi(x) = (f(W x') + epsilon) / sqrt(m)`` with ``x' = sqrt(scale) x``.

    With ``fn="relu"`` this is Performer-ReLU, the paper's best map for proteins. The kernel is not
    the softmax kernel: models are trained with it from the start. Functions of both signs (cos,
    tanh, identity, gelu) can bring normalisers close to zero. Source:
    Choromanski et al. 2021 (arXiv 2009.14794), section 2.2 and appendix B.3; ``elu+1`` without
    projection is the map of Katharopoulos et al. 2020.

    Args:
        head_dim: Length of a query or key vector.
        num_features: Length ``m`` of ``phi(x)``; by default the multiple of 32 nearest
            ``head_dim * ln(head_dim)``, at least 32. Without projection it is ``head_dim``.
        fn: One of ``FUNCTIONS`` or any elementwise callable on tensors.
        epsilon: Added to every feature.
        projection: One of ``PROJECTIONS``, or None for the deterministic map
            ``f(x') + epsilon``.
        num_heads: Draw a projection per head; None shares one.
        generator: Source of randomness; torch's default generator when None.

    Raises:
        ValueError: An argument is out of range or unknown.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int | None = None,
        *,
        fn: str | Callable[[Tensor], Tensor] = "relu",
        epsilon: float = 1e-3,
        projection: Projection | None = "orthogonal",
        num_heads: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(fn, str) and fn not in FUNCTIONS:
            raise ValueError(f"fn must be a callable or one of {tuple(FUNCTIONS)}, got {fn!r}")
        if not epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0, got {epsilon}")
        if projection is None:
            if num_features not in (None, head_dim):
                raise ValueError(
                    f"num_features must be head_dim ({head_dim}) or None when projection is None, "
                    f"got {num_features}"
                )
            if num_heads is not None:
                raise ValueError("num_heads must be None when projection is None")
            num_features = head_dim
        elif projection not in PROJECTIONS:
            raise ValueError(f"projection must be None or one of {PROJECTIONS}, got {projection!r}")
        num_features = resolve_num_features(head_dim, num_features)
        super().__init__(
            head_dim,
            num_features,
            num_rows=num_features,
            projection=projection,
            num_heads=num_heads,
            generator=generator,
        )
        self.fn = fn
        self.epsilon = float(epsilon)

    def form(self) -> FeatureForm:
        """The tensors and constants that attention backends evaluate."""
        # The logarithm of exp(y) + eps can be scaled before it overflows.
        return FeatureForm(
            "exponential" if self.fn == "exp" else "elementwise",
            self.weight,
            None,
            self.num_features,
            1.0 if self.projection is None else 1 / self.num_features,
            quadratic=False,
            epsilon=self.epsilon,
            function=FUNCTIONS[self.fn] if isinstance(self.fn, str) else self.fn,
        )

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        name = self.fn if isinstance(self.fn, str) else getattr(self.fn, "__name__", repr(self.fn))
        return f"{super().extra_repr()}, fn={name!r}, epsilon={self.epsilon}"
