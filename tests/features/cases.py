"""The feature maps under test: a new one is added here and inherits every test.

Each case has ``phi`` a second time, from the published formulas, in float64 and with the
exponential part as a logarithm, so that the tests owe nothing to the package's arithmetic.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from performers import GeneralizedFeatures, SoftmaxFeatures
from performers.features import CALIBRATED, ESTIMATORS, PROJECTIONS, FeatureMap, LearnedFeatures
from tests.features.maps import BiasedFeatures

LogPhi = Callable[..., tuple[Tensor, Tensor]]
"""``(feature_map, x, *, is_query=False)`` to ``log`` and ``base`` with ``phi = base * exp(log)``.

``x`` is float64, multiplied by ``sqrt(scale)``, shape ``(batch, heads, T, head_dim)``; both results
have shape ``(batch, heads, T, num_features)``, and ``sum phi(q) phi(k)`` is the kernel estimate.
"""


@dataclass(frozen=True)
class Case:
    """One feature map.

    Attributes:
        name: Test id.
        build: ``(head_dim, num_features or None, **keyword arguments)`` to a feature map.
        log_phi: The formula.
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


def generator(seed: int) -> torch.Generator:
    """A seeded CPU generator."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64, device="cpu")


def pairs(head_dim: int, lengths: list[tuple[float, float, float]], seed: int = 0) -> tuple:
    """Pairs of vectors with chosen ``(|q|, |k|, cosine)``, each ``(P, head_dim)``, float64."""
    basis, _ = torch.linalg.qr(normal(len(lengths), head_dim, 2, seed=seed))
    first, second = basis[..., 0], basis[..., 1]
    norms = torch.tensor(lengths, dtype=torch.float64)
    cosine = norms[:, 2:]
    query = norms[:, :1] * first
    key = norms[:, 1:2] * (cosine * first + (1 - cosine**2).sqrt() * second)
    return query, key


def sample(
    head_dim: int, heads: int = 1, *, batch: int = 2, length: int = 24, seed: int = 1234
) -> tuple[Tensor, Tensor]:
    """Queries and keys, ``(batch, heads, length, head_dim)``, float64, for ``scale=1``.

    Of different power, off centre, anisotropic, differently in each head.
    """
    random = generator(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64, device="cpu")

    spectrum = 1 / torch.arange(1, head_dim + 1, dtype=torch.float64, device="cpu")
    sides = []
    for power, widths in ((0.6, spectrum), (1.2, spectrum.flip(0))):
        mixing = widths.sqrt().unsqueeze(-1) * draw(heads, head_dim, head_dim)
        mixing = mixing * (power / mixing.square().sum((-2, -1), keepdim=True)).sqrt()
        mean = 0.3 * draw(heads, 1, head_dim) / head_dim**0.5
        sides.append(draw(batch, heads, length, head_dim) @ mixing + mean)
    return sides[0], sides[1]


def calibrate(feature_map: SoftmaxFeatures) -> SoftmaxFeatures:
    """The map fitted to ``sample``; unchanged on the meta device."""
    if feature_map.weight.device.type != "meta":
        feature_map.calibrate_(*sample(feature_map.head_dim, feature_map.num_heads or 1), scale=1.0)
    return feature_map


def _per_head(tensor: Tensor, x: Tensor) -> Tensor:
    """A map's tensor in float64, one for each head of ``x``."""
    tensor = tensor.detach().double()
    return tensor.repeat_interleave(x.shape[1] // tensor.shape[0], dim=0)


def _projected(feature_map: FeatureMap, x: Tensor) -> Tensor:
    return torch.einsum("bhtd,hmd->bhtm", x, _per_head(feature_map.weight, x))


def _log_exponential(wx: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    log = wx - x.square().sum(-1, keepdim=True) / 2 - math.log(wx.shape[-1]) / 2
    return log, torch.ones_like(log)


def _log_plain(m: FeatureMap, x: Tensor, *, is_query: bool = False) -> tuple[Tensor, Tensor]:
    wx = _projected(m, x)
    if m.estimator == "trigonometric":
        waves = torch.cat((wx.sin(), wx.cos()), dim=-1)
        log = x.square().sum(-1, keepdim=True) / 2 - math.log(wx.shape[-1]) / 2
        return log.expand_as(waves), waves
    return _log_exponential(torch.cat((wx, -wx), -1) if m.estimator == "hyperbolic" else wx, x)


def _log_calibrated(m: FeatureMap, x: Tensor, *, is_query: bool = False) -> tuple[Tensor, Tensor]:
    """``phi(x) = (N(w; 0, I) / N(w; c, T T^T))^{1/2} exp(w . x - |x|^2 / 2) / sqrt(m)``.

    With the map's rounded ``log |det T|``.
    """
    draws, center, transform = (_per_head(t, x) for t in (m.weight, m.center, m.transform))
    offset = torch.einsum("hij,hmj->hmi", transform, draws)
    rows = offset + center.unsqueeze(1)
    inverse = torch.linalg.inv(transform @ transform.mT)
    within = torch.einsum("hmi,hij,hmj->hm", offset, inverse, offset)
    log_proposal = -within / 2 - _per_head(m.log_volume, x).unsqueeze(-1)
    bias = (-rows.square().sum(-1) / 2 - log_proposal) / 2
    return _log_biased(m, x, rows, bias, is_query)


def _log_learned(m: FeatureMap, x: Tensor, *, is_query: bool = False) -> tuple[Tensor, Tensor]:
    """``phi(x) = exp(w . x + b - |x|^2 / 2) / sqrt(m)`` with the parameters ``w`` and ``b``."""
    return _log_biased(m, x, _per_head(m.weight, x), _per_head(m.bias, x), is_query)


def _log_biased(
    m: FeatureMap, x: Tensor, rows: Tensor, bias: Tensor, is_query: bool
) -> tuple[Tensor, Tensor]:
    matrix = m.query_transform if is_query else m.key_transform
    x = torch.einsum("hij,bhtj->bhti", _per_head(matrix, x), x)
    return _log_exponential(torch.einsum("bhtd,hmd->bhtm", x, rows) + bias.unsqueeze(1), x)


def _log_elementwise(
    function: Callable[[Tensor], Tensor], epsilon: float, projected: bool
) -> LogPhi:
    def log_phi(m: FeatureMap, x: Tensor, *, is_query: bool = False) -> tuple[Tensor, Tensor]:
        wx = _projected(m, x) if projected else x
        # A mean over draws; without a projection there is nothing to average.
        log = torch.full_like(wx, -math.log(wx.shape[-1] if projected else 1) / 2)
        if function is torch.exp:
            floor = torch.full_like(wx, epsilon).log()
            return log + torch.logaddexp(wx, floor), torch.ones_like(wx)
        return log, function(wx) + epsilon

    return log_phi


TWO_SIDED = ("hyperbolic", "trigonometric")


def _softmax_case(
    estimator: str, projection: str = "orthogonal", *, regularized: bool = False
) -> Case:
    def build(head_dim: int, num_features: int | None = None, **options: object) -> FeatureMap:
        options |= {"estimator": estimator, "projection": projection, "regularized": regularized}
        built = SoftmaxFeatures(head_dim, num_features, **options)
        return calibrate(built) if estimator in CALIBRATED else built

    # Named after what is not the default.
    parts = [estimator] if estimator != "positive" or not regularized else []
    parts += ["regularized"] * regularized + [projection] * (projection != "orthogonal")
    return Case(
        "-".join(parts),
        build,
        _log_calibrated if estimator in CALIBRATED else _log_plain,
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
    projection: str | None = "orthogonal",
) -> Case:
    projected = projection is not None

    def build(head_dim: int, num_features: int | None = None, **options: object) -> FeatureMap:
        options |= {"fn": fn, "epsilon": epsilon, "projection": projection}
        return GeneralizedFeatures(head_dim, num_features if projected else None, **options)

    return Case(
        name,
        build,
        _log_elementwise(function, epsilon, projected),
        signed=signed,
        projected=projected,
        drawn=projected,
        function=function,
        epsilon=epsilon,
    )


def _learned(head_dim: int, num_features: int | None = None, **options: object) -> FeatureMap:
    """Trained features, some steps away from the ``data_aware`` ones that they started from."""
    source = SoftmaxFeatures(head_dim, num_features, estimator="data_aware", **options)
    feature_map = LearnedFeatures(calibrate(source))
    count = torch.arange(feature_map.num_features, device=feature_map.bias.device)
    with torch.no_grad():
        feature_map.weight.mul_(0.9)
        feature_map.bias.add_(0.2 * count.sin())
    return feature_map


def _relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


# Every choice that the package accepts, and the regularized ones of the plain projections.
SOFTMAX = [
    *(
        _softmax_case(estimator, projection)
        for estimator in ESTIMATORS
        for projection in PROJECTIONS
        if not (estimator in TWO_SIDED and projection == "antithetic")
    ),
    *(_softmax_case("positive", projection, regularized=True) for projection in PROJECTIONS),
    *(_softmax_case(estimator, regularized=True) for estimator in TWO_SIDED),
]

LEARNED = Case(
    "learned", _learned, _log_learned, softmax=True, biased=True, drawn=False, calibrated=True
)

GENERALIZED = [
    _generalized_case("relu", "relu", _relu),
    _generalized_case("relu-gaussian", "relu", _relu, projection="gaussian", epsilon=0.01),
    _generalized_case("relu-antithetic", "relu", _relu, projection="antithetic"),
    _generalized_case("elu+1", "elu+1", _elu_plus_one),
    _generalized_case("exp", "exp", torch.exp),
    _generalized_case("exp-no-epsilon", "exp", torch.exp, epsilon=0.0),
    _generalized_case("sigmoid", "sigmoid", lambda x: 1 / (1 + (-x).exp())),
    _generalized_case(
        "gelu", "gelu", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2, signed=True
    ),
    _generalized_case("cos", "cos", torch.cos, signed=True),
    _generalized_case("tanh", "tanh", torch.tanh, signed=True),
    _generalized_case("abs", "abs", lambda x: (x * x).sqrt()),
    _generalized_case("identity", "identity", lambda x: x, signed=True),
    _generalized_case(
        "callable",
        torch.nn.functional.softplus,
        lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    ),
    _generalized_case("deterministic-relu", "relu", _relu, projection=None),
    _generalized_case("deterministic-elu+1", "elu+1", _elu_plus_one, projection=None),
]


def _log_with_bias(m: FeatureMap, x: Tensor, *, is_query: bool = False) -> tuple[Tensor, Tensor]:
    log, base = _log_plain(m, x)
    return log + _per_head(m.bias, x).unsqueeze(-2), base


# The general exponential, for attention.
BIASED = Case("bias", BiasedFeatures, _log_with_bias, softmax=True, biased=True)

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
            "positive", "positive-gaussian", "hyperbolic", "hyperbolic-gaussian", "trigonometric",
            "trigonometric-gaussian", "regularized", "optimal-simplex", "data_aware", "learned",
        ),
    ),
    *(case for case in GENERALIZED if case.name != "relu-antithetic"),
]  # fmt: skip


def marked(cases: list[Case], default: list[Case] = REPRESENTATIVE) -> list:
    """Cases, of which all but some are left to ``-m exhaustive``."""
    return [x if x in default else pytest.param(x, marks=pytest.mark.exhaustive) for x in cases]


# One of each form, for what runs by default outside tests/features: plain and two-sided
# exponentials, bias and balance, an epsilon, waves, elementwise of one and both signs, no
# projection.
FORMS = (
    "positive", "hyperbolic", "data_aware", "exp", "trigonometric", "relu", "cos",
    "deterministic-relu",
)  # fmt: skip
