"""What every backend is put through: backends, calls, and how results are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from performers import FavorState, backends, favor_attention
from performers.attention.backends import _BACKENDS
from performers.attention.call import AttentionCall
from performers.features import FeatureMap
from tests.attention import oracle
from tests.features.cases import REPRESENTATIVE, Case, by_name, generator
from tests.features.maps import BiasedFeatures


def _log_biased(
    feature_map: FeatureMap, x: Tensor, *, is_query: bool = False
) -> tuple[Tensor, Tensor]:
    log, base = by_name("positive").log_phi(feature_map, x)
    bias = feature_map.bias.double()
    return log + bias.repeat_interleave(x.shape[1] // bias.shape[0], dim=0).unsqueeze(-2), base


BACKENDS = backends()
TESTED = tuple(name for name in BACKENDS if name != "reference")
# Those that cover float64 and calls without rows.
WIDE = tuple(name for name in BACKENDS if name != "native")

MODES = ("bidirectional", "causal", "cross")
FEW = [by_name(name) for name in ("positive", "hyperbolic", "trigonometric", "relu", "exp")]
BIASED = Case("bias", BiasedFeatures, _log_biased)
ALL = [*REPRESENTATIVE, BIASED]
# The maps that windows and sinks go with.
EXACT = [*(case for case in REPRESENTATIVE if case.softmax), BIASED]
FEW_EXACT = [case for case in FEW if case.softmax]

VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


@cache
def covers(backend: str, case: Case, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a backend takes calls with a case's feature map."""
    x = torch.zeros(1, 1, 1, 8, dtype=dtype)
    call = AttentionCall(x, x, x, case.build(8, 16)).checked()
    return _BACKENDS[backend].uncovered(call) is None


def covered(cases: list[Case], backend: str) -> list[Case]:
    """The cases that a backend takes."""
    return [case for case in cases if covers(backend, case)]


@dataclass
class Call:
    """One attention call: a feature map's case, inputs and options."""

    case: Case
    feature_map: FeatureMap
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict

    def run(self, backend: str | None = None, **more: object) -> Tensor:
        """The package's output."""
        return favor_attention(
            self.query,
            self.key,
            self.value,
            self.feature_map,
            backend=backend,
            **{**self.options, **more},
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """The oracle's output and the conditioning of its rows."""
        return oracle.attend(
            self.case, self.feature_map, self.query, self.key, self.value, **self.options
        )

    def leaves(self, dtype: torch.dtype | None = None) -> "Call":
        """The same call on fresh leaf tensors that want gradients."""
        fresh = (
            x.detach().to(dtype or x.dtype).clone().requires_grad_()
            for x in (self.query, self.key, self.value)
        )
        return Call(self.case, self.feature_map, *fresh, self.options)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value


def make_call(
    case: Case,
    length: int,
    mode: str = "bidirectional",
    *,
    size: int | None = None,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    head_dim: int = 16,
    value_dim: int = 8,
    num_features: int = 48,
    num_heads: int | None = None,
    input_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: object,
) -> Call:
    """A call on Gaussian inputs; cross attention has ``2 L / 3 + 1`` keys unless ``size`` says."""
    random = generator(seed)
    if mode == "cross":
        size = 2 * length // 3 + 1 if size is None else size
    else:
        size = length
    key_heads = heads if key_heads is None else key_heads
    feature_map = case.build(
        head_dim, num_features, num_heads=num_heads if case.projected else None, generator=random
    ).to(torch.promote_types(dtype, torch.float32))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    query = (input_scale * normal(batch, heads, length, head_dim)).to(dtype)
    key = (input_scale * normal(batch, key_heads, size, head_dim)).to(dtype)
    value = normal(batch, key_heads, size, value_dim).to(dtype)
    if mode == "causal":
        options["is_causal"] = True
    return Call(case, feature_map, query, key, value, options)


def stream(
    call: Call,
    lengths: list[int],
    backend: str | None,
    state: FavorState | None = None,
    between: Callable[[FavorState], FavorState] = lambda state: state,
) -> tuple[Tensor, FavorState]:
    """The call in pieces, each resumed from the last; the outputs joined, and the last state."""
    options = {**call.options, "is_causal": True}
    mask = options.pop("key_mask", None)
    masks = [None] * len(lengths) if mask is None else mask.split(lengths, dim=1)
    outputs = []
    pieces = zip(*(x.split(lengths, dim=-2) for x in call.inputs), masks, strict=True)
    for query, key, value, piece_mask in pieces:
        out, state = favor_attention(
            query,
            key,
            value,
            call.feature_map,
            key_mask=piece_mask,
            state=state,
            return_state=True,
            backend=backend if query.shape[-2] else None,
            **options,
        )
        outputs.append(out)
        state = between(state)
    return torch.cat(outputs, dim=-2), state


def random_mask(batch: int, size: int, seed: int = 0, share: float = 0.7) -> Tensor:
    """A key mask with about ``share`` of the keys taking part."""
    return torch.rand(batch, size, generator=generator(seed)) < share


def assert_close_rows(
    actual: Tensor, expected: Tensor, conditioning: Tensor | float, tolerance: float
) -> None:
    """Within ``tolerance`` times the conditioning of each row.

    An error of ``epsilon`` in every feature moves the numerator by ``epsilon`` times the sum of
    absolute terms, that is by ``conditioning * |denominator|``, and the denominator by as much:
    the quotient by ``epsilon * conditioning * (1 + |out|)`` for values of order one. With features
    of one sign that is the plain tolerance, with both signs rows near a zero normaliser get more.
    """
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    if actual.numel():
        error = (actual.double() - expected.double()).abs()
        if isinstance(conditioning, Tensor) and conditioning.max() > 1 + 1e-9:
            error = error / (conditioning * (1 + expected.double().abs().amax(-1, keepdim=True)))
        assert error.max() <= tolerance, f"largest error {error.max():.3g} > {tolerance:.3g}"


def assert_close_gradients(
    actual: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    tolerance: float = GRADIENT_TOLERANCE,
) -> None:
    """Within ``tolerance`` of the largest entry of each gradient.

    Gradients that cancel to zero are sums of terms of order one, for a key one from each of the
    ``L / S`` queries that share it: they get a tenth of the tolerance, absolutely.
    """
    rows = actual[0].shape[-2] / max(actual[1].shape[-2], 1)
    floor = 0.1 * max(rows, 1) ** 0.5
    for name, a, b in zip(("query", "key", "value"), actual, expected, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all(), f"{name} gradient is not finite"
        if a.numel():
            error, size = (a.double() - b.double()).abs().max(), b.abs().max()
            assert error <= tolerance * max(size, floor), (
                f"{name} gradient: largest error {error:.3g}, largest entry {size:.3g}"
            )


def upstream(out: Tensor, conditioning: Tensor, seed: int = 99) -> Tensor:
    """Random output gradients; rows near a zero normaliser count by their conditioning.

    There the gradient of a quotient is of the order ``conditioning * (1 + |out|)`` and its error
    a further ``conditioning`` times larger: so weighted, every row's error is of one order.
    """
    random = torch.randn(out.shape, generator=generator(seed), dtype=torch.float64)
    if conditioning.numel() == 0 or conditioning.max() <= 1 + 1e-9:
        return random
    size = 1 + out.detach().double().abs().amax(-1, keepdim=True)
    return random / (conditioning.square() * size)


def check_against_oracle(
    call: Call,
    backend: str,
    *,
    value_tolerance: float = VALUE_TOLERANCE,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
    gradients: bool = True,
) -> None:
    """Values and, unless declined, the gradients of query, key and value."""
    if not gradients:
        expected, conditioning = call.expected()
        assert_close_rows(call.run(backend), expected, conditioning, value_tolerance)
        return
    ours, dense = call.leaves(), call.leaves(torch.float64)
    expected, conditioning = dense.expected()
    out = ours.run(backend)
    assert_close_rows(out.detach(), expected.detach(), conditioning, value_tolerance)
    weighting = upstream(expected, conditioning)
    wanted = torch.autograd.grad(expected, dense.inputs, weighting)
    got = torch.autograd.grad(out, ours.inputs, weighting.to(out.dtype))
    assert_close_gradients(got, wanted, gradient_tolerance)
