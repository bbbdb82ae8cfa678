"""Features whose projection is trained."""

import copy

import torch
from torch import Tensor, nn

from performers.features.base import FeatureMap
from performers.features.form import FeatureForm
from performers.features.softmax import SoftmaxFeatures


class LearnedFeatures(FeatureMap):
    """``phi(x) = exp(w_i . M x' + b_i - |M x'|^2 / 2) / sqrt(m)`` with trained ``w`` and ``b``.

    Initialised from ``SoftmaxFeatures``, whose features it computes at first. ``w`` and ``b`` are
    parameters, and gradients reach them through attention; the estimate of ``exp(q . k)`` is
    unbiased only at the start. ``redraw_`` leaves them unchanged, and ``M``, the balance of queries
    against keys, is a buffer. ``reset_parameters`` initialises them from a fresh draw of the same
    features, not calibrated.

    Args:
        features: Exponential softmax features, best calibrated: ``positive``, ``hyperbolic``,
            ``optimal``, ``sderf``, ``saderf`` or ``data_aware``.
        num_heads: Heads with separate parameters, initialised alike, when ``features`` share one
            projection; None keeps the heads of ``features``.

    Raises:
        ValueError: ``features`` is of another kind, or has another number of heads.
    """

    weight: Tensor
    bias: Tensor
    query_transform: Tensor | None
    key_transform: Tensor | None

    def __init__(self, features: FeatureMap, *, num_heads: int | None = None) -> None:
        form = features.form()
        if form.kind != "exponential" or not form.quadratic or form.weight is None:
            raise ValueError(
                "features must be SoftmaxFeatures of an exponential estimator (not trigonometric) "
                f"to be trained, got {features}"
            )
        if num_heads is not None and form.num_heads() not in (1, num_heads):
            raise ValueError(
                f"num_heads must be {form.num_heads()}, as in features, or None, got {num_heads}"
            )
        heads = features.num_heads if num_heads is None else num_heads
        super().__init__(
            features.head_dim,
            features.num_features,
            num_rows=features.num_features,
            projection=None,
            num_heads=heads,
        )
        self._normalizer = form.normalizer
        # For reset_parameters, without memory; in a tuple, so as to be no submodule.
        source = copy.deepcopy(features).to("meta")
        if isinstance(source, SoftmaxFeatures):
            source.reset_calibration_()
        self._source = (source,)
        # A buffer of the base class; here it is a parameter.
        del self._buffers["weight"]
        bias = form.weight.new_zeros(form.weight.shape[:-1]) if form.bias is None else form.bias
        for name, tensor in (("weight", form.weight), ("bias", bias)):
            shape = (heads or 1, *tensor.shape[1:])
            setattr(self, name, nn.Parameter(tensor.detach().expand(shape).clone()))
        for name in ("query_transform", "key_transform"):
            matrix = getattr(form, name)
            self.register_buffer(name, None if matrix is None else matrix.detach().clone())

    @torch.no_grad()
    def redraw_(self, generator: torch.Generator | None = None) -> "LearnedFeatures":
        """A no-op: a trained projection is not redrawn."""
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise from a fresh draw of the same features, not calibrated."""
        source = copy.deepcopy(self._source[0]).to_empty(device="cpu")
        source.reset_parameters()
        form = source.form()
        assert form.weight is not None
        self.weight.copy_(form.weight)
        self.bias.zero_() if form.bias is None else self.bias.copy_(form.bias)
        for name in ("query_transform", "key_transform"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(form, name))
        self._changed()

    def form(self) -> FeatureForm:
        """The tensors and constants that attention backends evaluate."""
        return FeatureForm(
            "exponential",
            self.weight,
            self.bias,
            self.num_features,
            self._normalizer,
            query_transform=self.query_transform,
            key_transform=self.key_transform,
        )
