"""The form of a feature map: the tensors and constants that a backend evaluates.

Every kernel estimate is ``K(q, k) = sum_i phi_i(q) phi_i(k)`` with features
``phi(x) = base(x) * exp(exponent(x))``. With the exponent kept apart, a backend can subtract a
scale before it exponentiates: no feature overflows, and no additive constant biases the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["exponential", "trigonometric", "elementwise"]


class FeatureForm(NamedTuple):
    """The tensors and constants that define ``phi``.

    * ``exponential``: ``exp(W x + b - |x|^2 / 2)``. With ``quadratic=False`` the norm is left out
      and ``epsilon`` is added to the feature: ``exp(W x + b) + epsilon``.
    * ``trigonometric``: ``exp(+|x|^2 / 2) (sin W x, cos W x)``.
    * ``elementwise``: ``f(W x + b) + epsilon``; without ``weight``, ``f(x) + epsilon``.

    Attributes:
        kind: One of the three.
        weight: ``W``, shape ``(1, rows, head_dim)`` or one per head ``(heads, rows, head_dim)``.
        bias: ``b``, shape ``(1 or heads, rows)``, or None for zero.
        num_features: Length of ``phi``; twice the rows of ``W`` for trigonometric features.
        normalizer: Factor that makes ``phi(q) . phi(k)`` the kernel estimate, ``1 / draws``.
        quadratic: Whether an exponential form subtracts ``|x|^2 / 2``.
        epsilon: Added to every feature.
        function: ``f`` of an elementwise form.
        query_transform: Matrix ``M`` applied to queries first, ``x -> M x``, shape
            ``(1 or heads, head_dim, head_dim)``; None for the identity.
        key_transform: The same for keys, ``M^{-T}``: inner products of queries and keys stay.
    """

    kind: Kind
    weight: Tensor | None
    bias: Tensor | None
    num_features: int
    normalizer: float
    quadratic: bool = True
    epsilon: float = 0.0
    function: Callable[[Tensor], Tensor] | None = None
    query_transform: Tensor | None = None
    key_transform: Tensor | None = None

    def num_heads(self) -> int:
        """Number of projections; 1 when all heads share one."""
        return 1 if self.weight is None else self.weight.shape[0]

    def estimates_softmax(self) -> bool:
        """Return True if inner products of features estimate ``exp(q . k)``."""
        return self.kind == "trigonometric" or (self.kind == "exponential" and self.quadratic)

    def to(self, dtype: torch.dtype) -> FeatureForm:
        """The same form with its tensors in ``dtype``."""
        return self._mapped(lambda tensor: tensor.to(dtype))

    def copied(self) -> FeatureForm:
        """The same form with cloned tensors, in the graph of the originals."""
        return self._mapped(torch.clone)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> FeatureForm:
        values: Any = [function(x) if isinstance(x, Tensor) else x for x in self]
        return FeatureForm(*values)

    def transformed(self, x: Tensor, *, is_query: bool) -> Tensor:
        """``M x`` of every vector, shape ``(..., heads, T, head_dim)``."""
        matrix = self.query_transform if is_query else self.key_transform
        if matrix is None:
            return x
        if matrix.shape[0] == 1:
            return F.linear(x, matrix[0])
        return x @ matrix.transpose(-1, -2)

    def decompose(self, x: Tensor, *, is_query: bool) -> tuple[Tensor | None, Tensor | None]:
        """Features as ``base * exp(exponent)``.

        Args:
            x: Transformed vectors, already multiplied by ``sqrt(scale)``, shape
                ``(..., heads, T, head_dim)``.
            is_query: Leave out what depends on the whole row only (``|q|^2 / 2``): it cancels in
                the normalisation of attention.

        Returns:
            ``base`` of shape ``(..., heads, T, num_features)``, or None when it is one, and
            ``exponent`` of shape ``(..., heads, T, num_features)`` or ``(..., heads, T, 1)``, or
            None when it is zero.
        """
        projected = self._project(x)
        if self.kind == "elementwise":
            assert self.function is not None
            return self.function(projected) + self.epsilon, None
        half_norm = None if is_query else x.square().sum(-1, keepdim=True) / 2
        if self.kind == "trigonometric":
            base = torch.cat((projected.sin(), projected.cos()), dim=-1)
            return base, half_norm
        if not self.quadratic:
            if self.epsilon == 0:
                return None, projected
            floor = projected.new_full((), math.log(self.epsilon))
            return None, torch.logaddexp(projected, floor)
        if half_norm is None:
            return None, projected
        # A key whose norm overflows has no feature, and its projection may be NaN.
        return None, (projected - half_norm).masked_fill(half_norm == math.inf, -math.inf)

    def _project(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        if self.num_heads() == 1:
            return F.linear(x, self.weight[0], None if self.bias is None else self.bias[0])
        projected = x @ self.weight.transpose(-1, -2)
        return projected if self.bias is None else projected + self.bias.unsqueeze(-2)


def times(base: Tensor | None, exponential: Tensor) -> Tensor:
    """``base * exponential``, where no base means one."""
    return exponential if base is None else base * exponential
