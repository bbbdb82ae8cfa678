"""Base class of the feature maps."""

import math
from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from performers.features.form import FeatureForm, times
from performers.features.precision import without_autocast
from performers.features.projections import Projection, draw_projection
from performers.features.recomputation import VersionedModule, guard_recomputation, is_traced


def resolve_num_features(
    head_dim: int, num_features: int | None, *, paired: str | None = None
) -> int:
    """A number of features, checked.

    None becomes the multiple of 32 nearest ``head_dim * ln(head_dim)``, at least 32. ``paired``
    names an estimator that makes two features of each row of its projection.

    Raises:
        ValueError: A number is below one, or ``num_features`` is odd for such an estimator.
    """
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    if num_features is None:
        return max(32, 32 * round(head_dim * math.log(head_dim) / 32))
    if num_features < 1 or (paired and num_features % 2):
        wanted = f"a positive even number for the {paired} estimator" if paired else "at least 1"
        raise ValueError(f"num_features must be {wanted}, got {num_features}")
    return num_features


class FeatureMap(VersionedModule):
    """A map ``phi`` whose inner products estimate a kernel.

    Subclasses choose the number of projection rows and implement ``form``. The projection is a
    persistent buffer ``weight`` of shape ``(1 or num_heads, rows, head_dim)``: it is drawn at
    construction, saved in the ``state_dict`` and changed only by ``redraw_`` or by loading.

    Attributes:
        head_dim: Length of a query or key vector.
        num_features: Length of ``phi(x)``.
        num_heads: Number of projections, one per head, or None when all heads share one.
    """

    weight: Tensor | None

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        *,
        num_rows: int,
        projection: Projection | None,
        regularized: bool = False,
        num_heads: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_heads is not None and num_heads < 1:
            raise ValueError(f"num_heads must be at least 1 or None, got {num_heads}")
        self.head_dim = head_dim
        self.num_features = num_features
        self.num_heads = num_heads
        self.projection = projection
        self.regularized = regularized
        self._num_rows = num_rows
        if projection is None:
            self.register_buffer("weight", None)
        else:
            # A new tensor has the default device and dtype, under a device context too.
            default = torch.empty(0)
            dtype = torch.promote_types(default.dtype, torch.float32)
            self.register_buffer("weight", self._draw(generator).to(default.device, dtype))

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        assert self.projection is not None
        draws = [
            draw_projection(
                self._num_rows,
                self.head_dim,
                projection=self.projection,
                regularized=self.regularized,
                generator=generator,
            )
            for _ in range(self.num_heads or 1)
        ]
        return torch.stack(draws)

    @torch.no_grad()
    def redraw_(self, generator: torch.Generator | None = None) -> "FeatureMap":
        """Draw a fresh projection in place; a no-op for a map without one.

        Args:
            generator: Source of randomness; torch's default CPU generator when None. The same
                generator state gives the same projection on every device.
        """
        if self.weight is not None:
            self.weight.copy_(self._draw(generator))
            self._changed()
        return self

    def reset_parameters(self) -> None:
        """Set all parameters and buffers as at construction: drawn, not calibrated.

        Called by code that materialises modules from the meta device.
        """
        self.redraw_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeatureMap":
        """Keep all tensors in float32 at least: rounding breaks orthogonality."""
        before: dict[str, Tensor | None] = dict(self._buffers)
        before |= {name: p.data for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = getattr(self, name)
            if tensor is not None and after.itemsize < 4 <= tensor.itemsize:
                if name in self._buffers:
                    self._buffers[name] = tensor.to(after.device)
                else:
                    after.data = tensor.to(after.device)
        return self

    def calibrate_(
        self,
        query: Tensor,
        key: Tensor,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        *,
        is_causal: bool = False,
        window: int | None = None,
        sinks: int = 0,
    ) -> "FeatureMap":
        """Fit a data-dependent estimator to sample queries and keys; a no-op for the others.

        Calls add up, so that samples can be streamed. Pass the options that attention will be
        called with: pairs that are exact there do not count here.

        Args:
            query: Shape ``(batch, heads, L, head_dim)``.
            key: Shape ``(batch, key_heads, S, head_dim)``; ``key_heads`` divides ``heads``. Heads
                that share a projection are pooled.
            key_mask: Bool, shape ``(batch, S)``, True where a key takes part.
            scale: As in ``estimate_kernel``.
            is_causal: Query ``i`` attends to keys ``0..i`` only.
            window: Pairs with ``|i - j| <= window`` are exact.
            sinks: The first ``sinks`` keys are exact.

        Returns:
            Self.

        Raises:
            ValueError: An argument does not fit or is not finite, or no call so far has left a
                pair.
        """
        return self

    def check_calibrated(self) -> None:
        """Check that an estimator that is fitted to data was calibrated.

        Raises:
            ValueError: The estimator is fitted to data and was not calibrated.
        """

    def form(self) -> FeatureForm:
        """The tensors and constants that attention backends evaluate."""
        raise NotImplementedError

    @overload
    def forward(self, x: None = None) -> FeatureForm: ...

    @overload
    def forward(
        self, x: Tensor, scale: float | None = None, *, is_query: bool = False
    ) -> Tensor: ...

    def forward(
        self, x: Tensor | None = None, scale: float | None = None, *, is_query: bool = False
    ) -> Tensor | FeatureForm:
        """Compute the features ``phi(sqrt(scale) x)``, or return the form when ``x`` is None.

        ``forward(q, is_query=True) @ forward(k).T`` is ``estimate_kernel(q, k)``. Features are not
        stabilised: large inputs overflow. Attention takes the form instead, and gets it by a call
        of the module, so that hooks that load parameters run (offloading, FSDP).

        Args:
            x: Shape ``(..., L, head_dim)``, or ``(..., num_heads, L, head_dim)`` for a map with a
                projection per head; None for the form.
            scale: ``1 / sqrt(head_dim)`` when None.
            is_query: Whether ``x`` holds queries; of effect only for estimators that balance
                queries against keys.

        Returns:
            Shape ``(..., L, num_features)``, or the form.

        Raises:
            ValueError: The estimator is fitted to data and was not calibrated, or ``x`` does not
                fit.
        """
        self.check_calibrated()
        form = self.form()
        if x is None:
            # A graph must keep this draw, and a hook may free the parameters that it loaded.
            graph = torch.is_grad_enabled() and not is_traced()
            return form.copied() if graph or self._forward_hooks else form
        (x,) = guard_recomputation((x,), self)
        with without_autocast(x.device):
            base, exponent = self._decompose(form, x, "x", scale, is_query=is_query)
            features = base if exponent is None else times(base, exponent.exp())
            assert features is not None
            return features * math.sqrt(form.normalizer)

    def estimate_kernel(self, query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
        """Estimate the kernel between all queries and keys, not normalised.

        For softmax features this is an estimate of ``exp(scale * q . k)``; for generalized ones
        it is ``(1 / m) sum_i (f(w_i . q') + eps)(f(w_i . k') + eps)`` with ``x' = sqrt(scale) x``,
        and without a projection the plain sum of ``(f(q'_i) + eps)(f(k'_i) + eps)``.

        Args:
            query: Shape ``(..., L, head_dim)``.
            key: Shape ``(..., S, head_dim)``.
            scale: ``1 / sqrt(head_dim)`` when None.

        Returns:
            Shape ``(..., L, S)``, in the input's dtype (computed in float32 at least).

        Raises:
            ValueError: The last dimension is not ``head_dim``, or ``scale`` is negative.
        """
        form: FeatureForm = self()
        query, key = guard_recomputation((query, key), self)
        with without_autocast(query.device):
            query_base, query_exponent = self._decompose(form, query, "query", scale, is_query=True)
            key_base, key_exponent = self._decompose(form, key, "key", scale, is_query=False)
            left, left_scale = _stabilized(query_base, query_exponent)
            right, right_scale = _stabilized(key_base, key_exponent)
            kernel = (left @ right.transpose(-1, -2)) * form.normalizer
            if left_scale is not None and right_scale is not None:
                kernel = kernel * (left_scale + right_scale.transpose(-1, -2)).exp()
            return kernel.to(query.dtype)

    def _decompose(
        self, form: FeatureForm, x: Tensor, name: str, scale: float | None, *, is_query: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        form = form.to(torch.promote_types(x.dtype, torch.float32))
        # Whole rows are compared here, so the norms of queries stay in.
        return form.decompose(self._scaled(form, x, name, scale, is_query=is_query), is_query=False)

    def _scaled(
        self, form: FeatureForm, x: Tensor, name: str, scale: float | None, *, is_query: bool
    ) -> Tensor:
        """``M sqrt(scale) x``, in float32 at least."""
        if x.ndim < 2 or x.shape[-1] != self.head_dim:
            raise ValueError(
                f"{name} must have shape (..., length, {self.head_dim}), got {tuple(x.shape)}"
            )
        if self.num_heads is not None and (x.ndim < 3 or x.shape[-3] != self.num_heads):
            raise ValueError(
                f"{name} must have shape (..., {self.num_heads}, length, {self.head_dim}) for a "
                f"feature map with num_heads={self.num_heads}, got {tuple(x.shape)}"
            )
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return form.transformed(
            x * math.sqrt(resolve_scale(scale, self.head_dim)), is_query=is_query
        )

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        heads = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        return (
            f"head_dim={self.head_dim}, num_features={self.num_features}, "
            f"projection={self.projection!r}{heads}"
        )


def form_of_heads(feature_map: FeatureMap, query: Tensor, key: Tensor) -> FeatureForm:
    """The form of a feature map, for queries and keys ``(batch, heads, length, head_dim)``.

    Raises:
        ValueError: ``feature_map`` is no FeatureMap, or its head_dim, num_heads or device differs.
    """
    heads, head_dim, key_heads = query.shape[1], query.shape[3], key.shape[1]
    if not isinstance(feature_map, FeatureMap):
        raise ValueError(
            "feature_map must be a FeatureMap such as SoftmaxFeatures, "
            f"got {type(feature_map).__name__}"
        )
    if feature_map.head_dim != head_dim:
        raise ValueError(
            f"feature_map has head_dim={feature_map.head_dim} but query has head_dim={head_dim}"
        )
    form: FeatureForm = feature_map()
    if form.weight is not None and form.weight.device != query.device:
        raise ValueError(
            f"feature_map is on {form.weight.device} but query is on {query.device}; move it with "
            "feature_map.to(query.device)"
        )
    check_num_heads(feature_map, heads, key_heads)
    return form


def check_num_heads(feature_map: FeatureMap, heads: int, key_heads: int) -> None:
    """Check that there is a projection for all, for each key head or for each query head.

    Raises:
        ValueError: ``num_heads`` of the feature map is another number.
    """
    if feature_map.num_heads not in (None, key_heads, heads):
        raise ValueError(
            f"feature_map has num_heads={feature_map.num_heads}; with {heads} query heads and "
            f"{key_heads} key heads it must be one of these or None"
        )


def check_key_mask(key_mask: Tensor, key: Tensor) -> None:
    """Check a mask of keys ``(batch, heads, S, head_dim)``.

    Raises:
        ValueError: ``key_mask`` is not bool, or not of shape ``(batch, S)``.
    """
    shape = (key.shape[0], key.shape[2])
    if key_mask.dtype != torch.bool or key_mask.shape != shape:
        raise ValueError(
            f"key_mask must be a bool tensor of shape {shape}, True = takes part, "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The factor on ``q . k``: ``1 / sqrt(head_dim)`` when None.

    Raises:
        ValueError: ``scale`` is negative or not finite.
    """
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be a finite number >= 0 or None, got {scale}")
    return float(scale)


def _stabilized(base: Tensor | None, exponent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Split features into a part of magnitude about one and a log scale per row."""
    if exponent is None:
        assert base is not None
        return base, None
    log_scale = exponent.amax(-1, keepdim=True)
    return times(base, (exponent - log_scale).exp()), log_scale
