"""Feature maps that are not in the package, built on its base class as a user's would be."""

import numpy as np
import torch
from torch import Tensor

from performers.features import FeatureForm, FeatureMap, SoftmaxFeatures


class QuadratureFeatures(FeatureMap):
    """``exp(q . k)`` without randomness: the Gaussian integral by Gauss-Hermite nodes.

    ``exp(q . k) = E[exp(w . (q + k))] e^{-(|q|^2 + |k|^2) / 2}``, and a product rule with 24 nodes
    in each of two dimensions has no visible error for vectors of ordinary length. Attention with
    these features is softmax attention, so conventions can be compared to many digits.
    """

    nodes: Tensor
    bias: Tensor

    def __init__(self, head_dim: int = 2, per_dimension: int = 24) -> None:
        super().__init__(head_dim, per_dimension**head_dim, num_rows=0, projection=None)
        nodes, mass = (
            torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(per_dimension)
        )
        log_mass = (mass / mass.sum()).log()
        self.register_buffer("nodes", torch.cartesian_prod(*[nodes] * head_dim).float())
        shares = torch.cartesian_prod(*[log_mass] * head_dim).sum(-1)
        self.register_buffer("bias", (shares / 2).float())

    def form(self) -> FeatureForm:
        return FeatureForm("exponential", self.nodes[None], self.bias[None], self.num_features, 1.0)


class BiasedFeatures(SoftmaxFeatures):
    """Positive features ``exp(w . x + b - |x|^2 / 2)`` with a bias: the general exponential."""

    bias: Tensor

    def __init__(self, head_dim: int, num_features: int | None = None, **options: object) -> None:
        super().__init__(head_dim, num_features, **options)
        shape = (self.num_heads or 1, self.num_features)
        self.register_buffer("bias", torch.randn(shape, generator=options.get("generator")))

    def form(self) -> FeatureForm:
        return super().form()._replace(bias=self.bias)
