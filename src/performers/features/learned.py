"""Features whose projection is trained."""

import copy

import torch
from torch import Tensor, nn

from performers.features.base import FeatureMap
from performers.features.form import FeatureForm
from performers.features.softmax import SoftmaxFeatures


class LearnedFeatures(FeatureMap):
    """``phi(x) = exp(w_i . M x' + b_i - |M x'|^2 / 2) / sqrt(m)`` with trained ``w`` and ``b``.

    The same kernel as ``SoftmaxFeatures``, started from one: at first it computes exactly what that
    one does. ``w`` and ``b`` are parameters, and gradients reach them through attention; the
    estimate of ``exp(q . k)`` is unbiased only at the start. ``redraw_`` leaves them alone, and
    ``M``, the balance of queries against keys, stays as it was. ``reset_parameters`` starts them
    again from a fresh draw of the features they came from, which are then fitted to nothing.

    Args:
        features: Exponential softmax features, best calibrated: ``positive``, ``hyperbolic``,
            ``optimal``, ``sderf``, ``saderf`` or ``data_aware``.
        num_heads: Heads that get parameters of their own, started alike, when those of
            ``features`` are shared; None keeps the heads of ``features``.

    Raises:
        ValueError: ``features`` is of another kind, or has another number of heads.

    Example:
        >>> from performers.features import SoftmaxFeatures
        >>> learned = LearnedFeatures(SoftmaxFeatures(64, 128), num_heads=8)
        >>> learned.weight.shape
        torch.Size([8, 128, 64])
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
        # For reset_parameters: how to draw again, without memory. In a tuple it is no submodule.
        source = copy.deepcopy(features).to("meta")
        if isinstance(source, SoftmaxFeatures):
            source.reset_calibration_()
        self._source = (source,)
        # The base class keeps its projection among the buffers; here it is a parameter.
        del self._buffers["weight"]
        bias = form.bias
        if bias is None:
            bias = form.weight.new_zeros(form.weight.shape[:-1])
        for name, tensor in (("weight", form.weight), ("bias", bias)):
            shape = (heads or 1, *tensor.shape[1:])
            setattr(self, name, nn.Parameter(tensor.detach().expand(shape).clone()))
        for name, matrix in (
            ("query_transform", form.query_transform),
            ("key_transform", form.key_transform),
        ):
            self.register_buffer(name, None if matrix is None else matrix.detach().clone())

    @torch.no_grad()
    def redraw_(self, generator: torch.Generator | None = None) -> "LearnedFeatures":
        """Nothing: a trained projection is not redrawn.

        Args:
            generator: Not used.

        Returns:
            Self.
        """
        del generator
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start again from a fresh draw of the features these came from, fitted to nothing."""
        source = copy.deepcopy(self._source[0]).to_empty(device="cpu")
        source.reset_parameters()
        form = source.form()
        assert form.weight is not None
        self.weight.copy_(form.weight)
        self.bias.zero_() if form.bias is None else self.bias.copy_(form.bias)
        for own, fresh in (
            (self.query_transform, form.query_transform),
            (self.key_transform, form.key_transform),
        ):
            if own is not None and fresh is not None:
                own.copy_(fresh)
        self._changed()

    def form(self) -> FeatureForm:
        """The record that attention backends evaluate."""
        return FeatureForm(
            "exponential",
            self.weight,
            self.bias,
            self.num_features,
            self._normalizer,
            query_transform=self.query_transform,
            key_transform=self.key_transform,
        )
