"""The feature maps under test: a new one is added here and inherits every test.

Each case writes ``phi`` down a second time, from the published formulas, in float64 and with the
exponential part as a logarithm, so that no test of the package leans on the package's own
arithmetic.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from performers import GeneralizedFeatures, SoftmaxFeatures
from performers.features import CALIBRATED, ESTIMATORS, PROJECTIONS, FeatureMap
from tests.features.calibrated import calibrate, learned, log_calibrated, log_learned

LogPhi = Callable[..., tuple[Tensor, Tensor]]
"""``(feature_map, x, *, is_query=False)`` to ``log`` and ``base`` with ``phi = base * exp(log)``.

``x`` is float64, already multiplied by ``sqrt(scale)``, shape ``(batch, heads, T, head_dim)``;
both results have shape ``(batch, heads, T, num_features)``. Constants common to all features are
left in, so that ``sum phi(q) phi(k)`` is the kernel estimate. Queries and keys have the same
``phi`` unless the estimator balances them against one another.
"""


@dataclass(frozen=True)
class Case:
    """One feature map.

    Attributes:
        name: For the test's id.
        build: ``(head_dim, num_features or None, **keyword arguments)`` to a feature map.
        log_phi: The formula, written again.
        signed: Whether features take both signs, so that normalisers can come close to zero.
        softmax: Whether the inner product estimates ``exp(q . k)``.
        biased: Whether that estimate is biased on purpose.
        projected: Whether there is a projection, which may be one per head.
        drawn: Whether that projection is random, and drawn again by ``redraw_``.
        calibrated: Whether the estimator is fitted to data; ``build`` fits it to a fixed sample.
        function: The scalar function of a generalized map, in float64.
        epsilon: The constant of a generalized map.
    """

    name: str
    build: Callable[..., FeatureMap]
    log_phi: LogPhi
    signed: bool = False
    softmax: bool = False
    biased: bool = False
    projected: bool = True
    drawn: bool = True
    calibrated: bool = False
    function: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    epsilon: float = 0.0

    def __str__(self) -> str:
        return self.name


def weight_of(feature_map: FeatureMap, heads: int) -> Tensor:
    """The projection with one matrix per head, ``(heads, rows, head_dim)``, float64."""
    assert feature_map.weight is not None
    weight = feature_map.weight.double()
    return weight.repeat_interleave(heads // weight.shape[0], dim=0)


def _projected(feature_map: FeatureMap, x: Tensor) -> Tensor:
    return torch.einsum("bhtd,hmd->bhtm", x, weight_of(feature_map, x.shape[1]))


def _log_positive(
    feature_map: FeatureMap, x: Tensor, *, is_query: bool = False
) -> tuple[Tensor, Tensor]:
    log = _projected(feature_map, x) - x.pow(2).sum(-1, keepdim=True) / 2
    return log - math.log(log.shape[-1]) / 2, torch.ones_like(log)


def _log_hyperbolic(
    feature_map: FeatureMap, x: Tensor, *, is_query: bool = False
) -> tuple[Tensor, Tensor]:
    wx = _projected(feature_map, x)
    log = torch.cat((wx, -wx), dim=-1) - x.pow(2).sum(-1, keepdim=True) / 2
    return log - math.log(2 * wx.shape[-1]) / 2, torch.ones_like(log)


def _log_trigonometric(
    feature_map: FeatureMap, x: Tensor, *, is_query: bool = False
) -> tuple[Tensor, Tensor]:
    wx = _projected(feature_map, x)
    waves = torch.cat((wx.sin(), wx.cos()), dim=-1)
    log = x.pow(2).sum(-1, keepdim=True) / 2 - math.log(wx.shape[-1]) / 2
    return log.expand_as(waves), waves


def _log_of(function: Callable[[Tensor], Tensor], epsilon: float, projected: bool) -> LogPhi:
    def log_phi(
        feature_map: FeatureMap, x: Tensor, *, is_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        wx = _projected(feature_map, x) if projected else x
        base = function(wx) + epsilon
        # A mean over draws; without a projection there is nothing to average.
        draws = base.shape[-1] if projected else 1
        return torch.full_like(base, -math.log(draws) / 2), base

    return log_phi


def _log_exp(epsilon: float) -> LogPhi:
    def log_phi(
        feature_map: FeatureMap, x: Tensor, *, is_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        log = _projected(feature_map, x)
        if epsilon:
            log = torch.logaddexp(log, torch.full_like(log, math.log(epsilon)))
        return log - math.log(log.shape[-1]) / 2, torch.ones_like(log)

    return log_phi


def _softmax_case(estimator: str, projection: str = "orthogonal", **options: object) -> Case:
    def build(head_dim: int, num_features: int | None = None, **more: object) -> FeatureMap:
        built = SoftmaxFeatures(
            head_dim,
            num_features,
            estimator=estimator,
            projection=projection,
            **options,
            **more,
        )
        return calibrate(built) if estimator in CALIBRATED else built

    regularized = bool(options.get("regularized", False))
    # Named after what is not the default.
    parts = {estimator: estimator != "positive" or not regularized, "regularized": regularized}
    parts[projection] = projection != "orthogonal"
    return Case(
        "-".join(part for part, there in parts.items() if there),
        build,
        _LOG_PHI.get(estimator, log_calibrated),
        softmax=True,
        signed=estimator == "trigonometric",
        biased=regularized,
        calibrated=estimator in CALIBRATED,
    )


def _generalized_case(
    name: str,
    fn: str | Callable[[Tensor], Tensor],
    function: Callable[[Tensor], Tensor],
    *,
    epsilon: float = 1e-3,
    signed: bool = False,
    log_phi: LogPhi | None = None,
    **options: object,
) -> Case:
    projected = options.get("projection", "orthogonal") is not None

    def build(head_dim: int, num_features: int | None = None, **more: object) -> FeatureMap:
        if not projected:
            num_features = None
        return GeneralizedFeatures(
            head_dim, num_features, fn=fn, epsilon=epsilon, **options, **more
        )

    return Case(
        name,
        build,
        log_phi or _log_of(function, epsilon, projected),
        signed=signed,
        projected=projected,
        drawn=projected,
        function=function,
        epsilon=epsilon,
    )


def _elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


_LOG_PHI = {
    "positive": _log_positive,
    "hyperbolic": _log_hyperbolic,
    "trigonometric": _log_trigonometric,
}
TWO_SIDED = ("hyperbolic", "trigonometric")

# Every choice that the package accepts, and the regularized ones of the plain projections.
SOFTMAX = [
    *(
        _softmax_case(estimator, projection)
        for estimator in ESTIMATORS
        for projection in PROJECTIONS
        if not (estimator in TWO_SIDED and projection == "antithetic")
    ),
    *(_softmax_case("positive", projection, regularized=True) for projection in PROJECTIONS),
    _softmax_case("hyperbolic", regularized=True),
    _softmax_case("trigonometric", regularized=True),
]

LEARNED = Case(
    "learned", learned, log_learned, softmax=True, biased=True, drawn=False, calibrated=True
)

GENERALIZED = [
    _generalized_case("relu", "relu", lambda x: x.clamp(min=0)),
    _generalized_case(
        "relu-gaussian", "relu", lambda x: x.clamp(min=0), projection="gaussian", epsilon=0.01
    ),
    _generalized_case("relu-antithetic", "relu", lambda x: x.clamp(min=0), projection="antithetic"),
    _generalized_case("elu+1", "elu+1", _elu_plus_one),
    _generalized_case("exp", "exp", torch.exp, log_phi=_log_exp(1e-3)),
    _generalized_case("exp-no-epsilon", "exp", torch.exp, epsilon=0.0, log_phi=_log_exp(0.0)),
    _generalized_case("sigmoid", "sigmoid", _sigmoid),
    _generalized_case("gelu", "gelu", _gelu, signed=True),
    _generalized_case("cos", "cos", torch.cos, signed=True),
    _generalized_case("tanh", "tanh", torch.tanh, signed=True),
    _generalized_case("abs", "abs", lambda x: (x * x).sqrt()),
    _generalized_case("identity", "identity", lambda x: x, signed=True),
    _generalized_case("callable", torch.nn.functional.softplus, _softplus),
    _generalized_case("deterministic-relu", "relu", lambda x: x.clamp(min=0), projection=None),
    _generalized_case("deterministic-elu+1", "elu+1", _elu_plus_one, projection=None),
]

CASES = [*SOFTMAX, LEARNED, *GENERALIZED]


def by_name(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)


# For batteries that run everything for each case. Estimators and projections reach attention as the
# same few tensors, so it takes one of each kind: drawn with and without coupling, two-sided,
# signed, balanced with a bias, a bias alone, trained.
REPRESENTATIVE = [
    *map(
        by_name,
        (
            "positive",
            "positive-gaussian",
            "hyperbolic",
            "hyperbolic-gaussian",
            "trigonometric",
            "trigonometric-gaussian",
            "regularized",
            "optimal-simplex",
            "data_aware",
            "learned",
        ),
    ),
    *(case for case in GENERALIZED if case.name != "relu-antithetic"),
]

# One of each form, for what runs by default outside tests/features: plain and two-sided
# exponentials, bias and balance, an epsilon, waves, elementwise of one and both signs, no
# projection.
FORMS = (
    "positive",
    "hyperbolic",
    "data_aware",
    "exp",
    "trigonometric",
    "relu",
    "cos",
    "deterministic-relu",
)


def generator(seed: int) -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(seed)


def pairs(head_dim: int, lengths: list[tuple[float, float, float]], seed: int = 0) -> tuple:
    """Pairs of vectors with chosen ``(|q|, |k|, cosine)``, each ``(P, head_dim)``, float64."""
    draws = torch.randn(len(lengths), head_dim, 2, generator=generator(seed), dtype=torch.float64)
    basis, _ = torch.linalg.qr(draws)
    first, second = basis[..., 0], basis[..., 1]
    norms = torch.tensor(lengths, dtype=torch.float64)
    cosine = norms[:, 2:]
    query = norms[:, :1] * first
    key = norms[:, 1:2] * (cosine * first + (1 - cosine**2).sqrt() * second)
    return query, key
