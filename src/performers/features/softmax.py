"""Unbiased random features of the softmax kernel ``exp(q . k)``."""

import copy
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from performers.features.base import (
    FeatureMap,
    check_key_mask,
    check_num_heads,
    resolve_num_features,
    resolve_scale,
)
from performers.features.form import FeatureForm
from performers.features.moments import PairMoments, add_attention_pairs
from performers.features.precision import without_autocast
from performers.features.projections import PROJECTIONS, Projection
from performers.features.proposal import (
    CALIBRATED,
    Proposal,
    fit_proposal,
    proposed_rows,
    standard_proposal,
)
from performers.features.recomputation import is_traced, is_transformed

Estimator = Literal[
    "positive", "hyperbolic", "trigonometric", "optimal", "sderf", "saderf", "data_aware"
]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
TWO_SIDED = ("hyperbolic", "trigonometric")
BALANCED = ("saderf", "data_aware")


class SoftmaxFeatures(FeatureMap):
    """FAVOR+ and its relatives: features whose inner products estimate ``exp(scale * q . k)``.

    With ``x' = sqrt(scale) x``, ``w_i`` the rows of the projection and ``m = num_features``:

    * ``positive``: ``phi(x) = exp(w_i . x' - |x'|^2 / 2) / sqrt(m)``, ``m`` draws.
    * ``hyperbolic``: the same with rows ``w_i`` and ``-w_i``, ``m / 2`` draws.
    * ``trigonometric``: ``exp(|x'|^2 / 2) (sin w_i . x', cos w_i . x') sqrt(2 / m)``, ``m / 2``
      draws. Not positive: normalisers can come close to zero.

    Four more draw their rows from a Gaussian fitted to queries and keys, and correct for that with
    a bias: ``phi(x) = exp(w_i . x' + b_i - |x'|^2 / 2) / sqrt(m)`` (``features/proposal.py`` has
    the formulas). Call ``calibrate_`` first; until then attention with them raises.

    * ``data_aware``: centre and covariance fitted to pairs weighted by attention, after queries and
      keys have been transformed to one covariance. The most accurate on real heads.
    * ``optimal``: FAVOR++, one width for all directions.
    * ``sderf``, ``saderf``: FAVOR# as published, dense and symmetric.

    All are unbiased for every projection and every calibration.
    ``regularized=True`` (SMREG) fixes the row lengths at ``sqrt(head_dim)``: less variance, biased
    low by a factor that tends to one as ``head_dim`` grows. Source: Choromanski et al. 2021 (arXiv
    2009.14794), Lemmas 1 and 2, sections 2.4 and 3; Likhosherstov et al. 2022 (arXiv 2205.15317)
    and 2023 (arXiv 2302.00787).

    The projection is a buffer, ``weight``. Weight averaging (EMA, SWA) must copy it and not average
    it (``AveragedModel`` without ``use_buffers``), see ``redraw_features_``.

    Args:
        head_dim: Length of a query or key vector.
        num_features: Length ``m`` of ``phi(x)``; by default the multiple of 32 nearest
            ``head_dim * ln(head_dim)``, at least 32. Even for the two-sided estimators.
        estimator: One of the seven above.
        projection: How rows are drawn: ``"orthogonal"``, ``"gaussian"``, ``"simplex"``,
            ``"hadamard"`` or ``"antithetic"`` (for one-sided estimators only), see
            ``draw_projection``.
        regularized: SMREG; not for the estimators that are calibrated.
        num_heads: Draw and fit a projection per head; None shares one.
        generator: Source of randomness; torch's default generator when None.

    Raises:
        ValueError: An argument is out of range or unknown.

    Example:
        >>> features = SoftmaxFeatures(64, 256)
        >>> features.estimate_kernel(torch.randn(10, 64), torch.randn(12, 64)).shape
        torch.Size([10, 12])
    """

    center: Tensor
    transform: Tensor
    query_transform: Tensor
    key_transform: Tensor
    log_volume: Tensor
    _is_calibrated = False

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
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}")
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {PROJECTIONS}, got {projection!r}")
        two_sided = estimator in TWO_SIDED
        num_features = resolve_num_features(
            head_dim, num_features, paired=estimator if two_sided else None
        )
        if two_sided and projection == "antithetic":
            raise ValueError(
                f"projection must not be 'antithetic' for the {estimator} estimator, which has the "
                "opposite of every row already: all rows would come twice; take 'orthogonal'"
            )
        if regularized and estimator in CALIBRATED:
            raise ValueError(
                f"regularized must be False for the {estimator} estimator, whose correction is "
                f"for Gaussian rows; it goes with {tuple(set(ESTIMATORS) - set(CALIBRATED))}"
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
        self._moments: PairMoments | None = None
        if estimator in CALIBRATED:
            weight = self.weight
            assert weight is not None
            for name, tensor in _tensors(standard_proposal(num_heads or 1, head_dim)).items():
                # Loading keeps no strides, and products round by them.
                tensor = tensor.to(weight).clone(memory_format=torch.contiguous_format)
                self.register_buffer(name, tensor)

    @torch.no_grad()
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
    ) -> "SoftmaxFeatures":
        """Fit the estimator to sample queries and keys; a no-op for the others.

        See ``FeatureMap.calibrate_`` for the arguments. Calls add up until ``reset_calibration_``
        or the loading of a ``state_dict``. The projection stays, and ``redraw_`` keeps the fit.
        With fewer samples than a few times ``head_dim`` the fit of ``data_aware`` is pulled towards
        that of ``optimal``.
        """
        if self.estimator not in CALIBRATED:
            return self
        query, key = self._grouped(query, key)
        if (window is not None and window < 0) or sinks < 0:
            raise ValueError(
                f"window and sinks must be at least 0, got window={window} and sinks={sinks}"
            )
        if (is_causal or window is not None) and query.shape[-2] != key.shape[-2]:
            raise ValueError(
                "is_causal and window need as many keys as queries, got "
                f"{key.shape[-2]} and {query.shape[-2]}"
            )
        if key_mask is not None:
            check_key_mask(key_mask, key)
        # A copy, so that a call that fails changes nothing.
        moments = copy.deepcopy(self._moments) or PairMoments.empty(
            self.num_heads or 1, self.head_dim
        )
        root = math.sqrt(resolve_scale(scale, self.head_dim))
        with without_autocast(query.device):
            add_attention_pairs(
                moments,
                query * root,
                key * root,
                key_mask=key_mask,
                is_causal=is_causal,
                window=window,
                sinks=sinks,
                attention_weighted=self.estimator == "data_aware",
            )
        if not bool((moments.weight > 0).any()):
            raise ValueError(
                "query and key leave no pair to estimate: with these window, sinks and key_mask "
                "all are exact; calibrate on longer sequences, or with a smaller window"
            )
        self._moments = moments
        self._adopt(fit_proposal(self.estimator, moments))
        self._is_calibrated = True
        return self

    @torch.no_grad()
    def adopt_calibration_(self, fitted: "SoftmaxFeatures") -> "SoftmaxFeatures":
        """Copy the fit of a map of the same estimator and heads; the projection stays."""
        for name, tensor in fitted.named_buffers():
            if name != "weight":
                self.get_buffer(name).copy_(tensor)
        self._moments, self._is_calibrated = fitted._moments, fitted._is_calibrated
        self._changed()
        return self

    def reset_parameters(self) -> None:
        """Set all buffers as at construction: drawn, not calibrated."""
        super().reset_parameters()
        self.reset_calibration_()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The moments behind a fit are not saved: later samples must not be added to other ones.
        self._moments, self._is_calibrated = None, False
        super()._load_from_state_dict(*args, **kwargs)

    def reset_calibration_(self) -> "SoftmaxFeatures":
        """Forget all samples."""
        self._moments, self._is_calibrated = None, False
        if self.estimator in CALIBRATED:
            self._adopt(standard_proposal(self.num_heads or 1, self.head_dim))
        return self

    def _adopt(self, proposal: Proposal) -> None:
        for name, tensor in _tensors(proposal).items():
            self.get_buffer(name).copy_(tensor)
        self._changed()

    def _grouped(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query ``(batch, heads, groups, L, d)`` and key ``(batch, heads, S, d)``.

        ``heads`` are those of the projection, or of the keys when all share one.
        """
        for name, x in (("query", query), ("key", key)):
            if x.ndim != 4 or x.shape[-1] != self.head_dim or not x.is_floating_point():
                raise ValueError(
                    f"{name} must be a floating-point tensor of shape (batch, heads, length, "
                    f"{self.head_dim}), got {x.dtype} {tuple(x.shape)}"
                )
        heads, key_heads = query.shape[1], key.shape[1]
        if key.shape[0] != query.shape[0] or key_heads == 0 or heads % key_heads:
            raise ValueError(
                f"key must have batch size {query.shape[0]} and a number of heads that divides "
                f"{heads}, got {tuple(key.shape)}"
            )
        check_num_heads(self, heads, key_heads)
        if self.num_heads == heads != key_heads:
            key = key.repeat_interleave(heads // key_heads, dim=1)
            key_heads = heads
        return query.unflatten(1, (key_heads, heads // key_heads)), key

    @property
    def is_calibrated(self) -> bool:
        """True if the estimator is fitted to samples, as `calibrate_` or loading left it."""
        if not self._is_calibrated and self.estimator in CALIBRATED:
            # Libraries load in many ways: the buffers tell.
            self._is_calibrated = bool(self._is_fitted())
        return self._is_calibrated

    def _is_fitted(self) -> Tensor:
        eye = torch.eye(self.head_dim, device=self.transform.device)
        matrices = (self.transform != eye).any() | (self.query_transform != eye).any()
        return matrices | (self.center != 0).any()

    def check_calibrated(self) -> None:
        """Check that an estimator that is fitted to data was calibrated.

        Raises:
            ValueError: The estimator is fitted to data and was not calibrated.
        """
        if self.estimator not in CALIBRATED or self._is_calibrated:
            return
        message = (
            f"estimator={self.estimator!r} is fitted to data: call calibrate_ with queries and "
            "keys of the model first, or take estimator='positive'"
        )
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                torch._assert_async(self._is_fitted(), message)
            return
        has_values = not (self.transform.is_meta or is_traced() or is_transformed())
        if has_values and not self.is_calibrated:
            raise ValueError(message)

    def form(self) -> FeatureForm:
        """The tensors and constants that attention backends evaluate."""
        weight, bias, query_transform, key_transform = self.weight, None, None, None
        assert weight is not None
        if self.estimator == "trigonometric":
            return FeatureForm("trigonometric", weight, None, self.num_features, 1 / self._num_rows)
        if self.estimator == "hyperbolic":
            weight = torch.cat((weight, -weight), dim=-2)
        elif self.estimator in CALIBRATED:
            with without_autocast(weight.device):
                weight, bias = proposed_rows(weight, self.center, self.transform, self.log_volume)
        if self.estimator in BALANCED:
            query_transform, key_transform = self.query_transform, self.key_transform
        return FeatureForm(
            "exponential",
            weight,
            bias,
            self.num_features,
            1 / self.num_features,
            query_transform=query_transform,
            key_transform=key_transform,
        )

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        regularized = ", regularized=True" if self.regularized else ""
        return f"{super().extra_repr()}, estimator={self.estimator!r}{regularized}"


def _tensors(proposal: Proposal) -> dict[str, Tensor]:
    """The buffers of a map with this proposal."""
    return {**proposal._asdict(), "log_volume": torch.linalg.slogdet(proposal.transform)[1]}
