"""The calls that every backend is put through, and the comparison of results.

A law is a test over backends, configurations, maps and modes, without what the package refuses.
"""

import copy
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from inspect import signature

import pytest
import torch
from torch import Tensor

from performers import FavorState, LearnedFeatures, ListedKeys, backends, favor_attention
from performers.attention.backends import _BACKENDS, Backend
from performers.attention.call import AttentionCall
from performers.features import FeatureMap
from tests.attention import oracle
from tests.features.cases import BIASED, FORMS, REPRESENTATIVE, Case, by_name, generator

BACKENDS = backends()
# The reference is quadratic: tests of long inputs leave it out.
LINEAR = tuple(name for name in BACKENDS if name != "reference")
MODES = ("bidirectional", "causal", "cross")
SELF = MODES[:2]

# One of each form; estimators and projections, told apart in tests/features, reach attention as the
# same few tensors.
ALL = [*map(by_name, FORMS), BIASED]
EVERY = [*REPRESENTATIVE, BIASED]
CASES = {case.name: case for case in EVERY}
POSITIVE = by_name("positive")

VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Configuration:
    """A named set of options of ``favor_attention``.

    ``masked`` masks a random third of the keys, and the first ones of the first row; ``grouped``
    lets two query heads share a key head, each key head with its own projection.
    """

    name: str
    window: int | None = None
    sinks: int = 0
    listed: bool = False
    packed: bool = False
    masked: bool = False
    grouped: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def exact(self) -> bool:
        """True if some keys are exact."""
        return self.window is not None or self.sinks > 0 or self.listed

    def takes(self, case: Case, mode: str) -> bool:
        """True if the package takes these options with a feature map and a mode."""
        if (self.exact and not case.softmax) or (self.listed and case.signed):
            return False
        return mode != "cross" or (self.window is None and not self.packed)


PLAIN = Configuration("plain")
BOTH = Configuration("window and sinks", window=70, sinks=3)
FEW = Configuration("a few exact keys", window=6, sinks=3)
WINDOW = Configuration("window", window=7)
LISTED = Configuration("listed", listed=True)
CONFIGURATIONS = [
    PLAIN,
    WINDOW,
    Configuration("sinks", sinks=3),
    BOTH,
    LISTED,
    Configuration("packed", packed=True),
    Configuration("masked", masked=True),
    Configuration("grouped heads", grouped=True),
    Configuration("masked window", window=7, sinks=3, masked=True, grouped=True),
    Configuration("packed window", window=7, sinks=3, packed=True, masked=True, grouped=True),
    Configuration("listed window", window=5, sinks=2, listed=True, masked=True, grouped=True),
]
PACKED = [x for x in CONFIGURATIONS if x.packed]
# Those that a state continues.
STREAMED = [x for x in CONFIGURATIONS if not (x.packed or x.listed)]


def exhaustive(*values: object) -> object:
    """A parameter of ``-m exhaustive`` alone."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def law(
    backends: Iterable = BACKENDS,
    configurations: Iterable = CONFIGURATIONS,
    cases: Iterable = ALL,
    modes: Iterable = MODES,
) -> Callable[[Callable], Callable]:
    """Parametrise a test by what it takes of backend, configuration, feature map and mode."""
    axes = {"mode": modes, "configuration": configurations, "case": cases, "backend": backends}

    def parametrised(test: Callable) -> Callable:
        for name, values in axes.items():
            if name in signature(test).parameters:
                test = pytest.mark.parametrize(name, values, ids=str)(test)
        return test

    return parametrised


_record = threading.local()


def last_backend() -> str | None:
    """The backend that ran last in this thread."""
    return getattr(_record, "backend", None)


def _recorded(name: str, backend: Backend) -> Backend:
    def attend(call: AttentionCall) -> tuple[Tensor, FavorState | None]:
        if not torch.compiler.is_compiling():
            _record.backend = name
        return backend.attend(call)

    return backend._replace(attend=attend)


_BACKENDS.update({name: _recorded(name, backend) for name, backend in _BACKENDS.items()})


@cache
def refusal(
    backend: str, case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> str | None:
    """A backend's objection to a feature map, dtype or device; None if it takes them."""
    x = torch.zeros(1, 1, 1, 8, dtype=dtype, device=device)
    try:
        favor_attention(x, x, x, case.build(8, 16).to(device), backend=backend)
    except ValueError as error:
        if "does not cover" not in str(error):
            raise
        return str(error)
    return None


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
        """The package's output, from the backend that was asked for."""
        _record.backend = None
        options = {**self.options, **more}
        out = favor_attention(*self.inputs, self.feature_map, backend=backend, **options)
        assert last_backend() == backend or backend is None
        return out

    def checked(self, **more: object) -> AttentionCall:
        """The call as backends get it."""
        options = {**self.options, **more}
        return AttentionCall(*self.inputs, self.feature_map, **options).checked()

    def expected(self) -> tuple[Tensor, Tensor]:
        """The oracle's output and the conditioning of its rows, on the CPU."""
        call = self if self.query.device.type == "cpu" else self.to("cpu")
        return oracle.attend(call.case, call.feature_map, *call.inputs, **call.options)

    def with_inputs(self, *inputs: Tensor) -> "Call":
        """The same call with other queries, keys and values."""
        return Call(self.case, self.feature_map, *inputs, self.options)

    def leaves(self, dtype: torch.dtype | None = None) -> "Call":
        """The same call on fresh leaf tensors that require gradients."""
        fresh = (x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in self.inputs)
        return self.with_inputs(*fresh)

    def to(self, device: str) -> "Call":
        """A copy of the call on a device."""
        options = {
            name: copy.deepcopy(x).to(device) if isinstance(x, Tensor | ListedKeys) else x
            for name, x in self.options.items()
        }
        feature_map = copy.deepcopy(self.feature_map).to(device)
        return Call(self.case, feature_map, *(x.to(device) for x in self.inputs), options)

    def dense(self) -> "Call":
        """The same call for the oracle: on the CPU, on leaves in float64."""
        return self.to("cpu").leaves(torch.float64)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value


def make_call(
    case: Case,
    length: int,
    mode: str = "bidirectional",
    configuration: Configuration = PLAIN,
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
    device: str = "cpu",
    seed: int = 0,
    **options: object,
) -> Call:
    """A call on Gaussian inputs; cross attention has ``2 L / 3 + 1`` keys unless ``size`` says."""
    random = generator(seed)
    if mode == "cross":
        size = 2 * length // 3 + 1 if size is None else size
    else:
        size = length
    if configuration.grouped:
        heads, key_heads, num_heads = 4, 2, 2
    if configuration.packed:
        batch = 1
    key_heads = heads if key_heads is None else key_heads
    feature_map = case.build(
        head_dim, num_features, num_heads=num_heads if case.projected else None, generator=random
    ).to(torch.promote_types(dtype, torch.float32))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    query = (input_scale * normal(batch, heads, length, head_dim)).to(dtype)
    key = (input_scale * normal(batch, key_heads, size, head_dim)).to(dtype)
    value = normal(batch, key_heads, size, value_dim).to(dtype)
    call = Call(case, feature_map, query, key, value, {})
    if mode == "causal":
        call.options["is_causal"] = True
    if configuration.window is not None:
        call.options["window"] = configuration.window
    if configuration.sinks:
        call.options["sinks"] = configuration.sinks
    if configuration.listed:
        call.options["listed_keys"] = ListedKeys(
            head_dim, 4, 12, num_rounds=2, refresh=16, num_heads=num_heads, generator=random
        )
    if configuration.packed:
        call.options["cu_seqlens"] = packing(length)
    if configuration.masked:
        call.options["key_mask"] = random_mask(batch, size, seed)
        call.options["key_mask"][:1, :5] = False
    call.options |= options
    return call if device == "cpu" else call.to(device)


def packing(length: int) -> Tensor:
    """Boundaries of empty, short and long sequences, at and beside those of chunks."""
    starts = (0, 0, 1, 1, 4, 40, 64, 65, 65, 128)
    return torch.tensor([*(min(x, length) for x in starts), length], dtype=torch.int32)


def trained(call: Call) -> Call:
    """The call with projection and bias as parameters."""
    heads = call.feature_map.form().num_heads()
    call.feature_map = LearnedFeatures(call.feature_map, num_heads=None if heads == 1 else heads)
    return call


def stream(
    call: Call,
    lengths: list[int],
    backend: str | None,
    state: FavorState | None = None,
    between: Callable[[FavorState], FavorState] = lambda state: state,
) -> tuple[Tensor, FavorState]:
    """The call in pieces, each resumed from the last; the outputs joined, and the last state."""
    call = Call(call.case, call.feature_map, *call.inputs, {**call.options, "is_causal": True})
    mask = call.options.pop("key_mask", None)
    masks = [None] * len(lengths) if mask is None else mask.split(lengths, dim=1)
    outputs = []
    pieces = zip(*(x.split(lengths, dim=-2) for x in call.inputs), strict=True)
    for inputs, piece_mask in zip(pieces, masks, strict=True):
        out, state = call.with_inputs(*inputs).run(
            backend, key_mask=piece_mask, state=state, return_state=True
        )
        outputs.append(out)
        state = between(state)
    return torch.cat(outputs, dim=-2), state


def random_mask(batch: int, size: int, seed: int = 0, share: float = 0.7) -> Tensor:
    """A key mask with about ``share`` of the keys taking part."""
    return torch.rand(batch, size, generator=generator(seed)) < share


def with_gradients(
    call: Call, backend: str | None = None, weight: Tensor | None = None, **options: object
) -> tuple[Tensor, ...]:
    """The output, and the gradients of fresh leaves for an output gradient, random if not given."""
    call = call.leaves()
    out = call.run(backend, **options)
    if weight is None:
        weight = torch.randn(out.shape, generator=generator(17))
    weight = weight.to(out)
    return out.detach(), *torch.autograd.grad(out, call.inputs, weight)


def assert_equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    """The same bits, and all of them finite."""
    for a, b in zip(first, second, strict=True):
        assert torch.isfinite(b).all()
        assert torch.equal(a, b)


def assert_close_rows(
    actual: Tensor, expected: Tensor, conditioning: Tensor | float, tolerance: float
) -> None:
    """Within ``tolerance`` times the conditioning of each row.

    An error of ``epsilon`` in every feature moves numerator and denominator by ``epsilon *
    conditioning * |denominator|``: the quotient by ``epsilon * conditioning * (1 + |out|)``.
    """
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    if actual.numel():
        error = (actual.cpu().double() - expected.cpu().double()).abs()
        if isinstance(conditioning, Tensor) and conditioning.max() > 1 + 1e-9:
            error = error / (conditioning * (1 + expected.double().abs().amax(-1, keepdim=True)))
        assert error.max() <= tolerance, f"largest error {error.max():.3g} > {tolerance:.3g}"


def assert_close_gradients(
    actual: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    tolerance: float = GRADIENT_TOLERANCE,
) -> None:
    """Within ``tolerance`` of the largest entry of each gradient.

    Gradients that cancel to zero, sums of terms of order one, get a tenth of it, absolutely.
    """
    rows = actual[0].shape[-2] / max(actual[1].shape[-2], 1)
    floor = 0.1 * max(rows, 1) ** 0.5
    for name, a, b in zip(("query", "key", "value"), actual, expected, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all(), f"{name} gradient is not finite"
        if a.numel():
            error, size = (a.cpu().double() - b.cpu().double()).abs().max(), b.abs().max().cpu()
            assert error <= tolerance * max(size, floor), (
                f"{name} gradient: largest error {error:.3g}, largest entry {size:.3g}"
            )


def upstream(out: Tensor, conditioning: Tensor, seed: int = 99) -> Tensor:
    """Random output gradients, divided by the order of the error of each row's gradient."""
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
    run: Callable[[Call], Tensor] | None = None,
    smallness: Callable[[Call], Tensor] | None = None,
) -> None:
    """Values and gradients; output gradients are divided by the ``smallness`` of their row."""
    if "listed_keys" in call.options:
        # The estimates of listed keys are taken from sums that hold them.
        value_tolerance, gradient_tolerance = 3 * value_tolerance, 3 * gradient_tolerance
    ours, dense = call.leaves(), call.dense()
    expected, conditioning = dense.expected()
    with torch.set_grad_enabled(gradients):
        out = ours.run(backend) if run is None else run(ours)
    assert_close_rows(out.detach(), expected.detach(), conditioning, value_tolerance)
    if not gradients:
        return
    weighting = upstream(expected, conditioning)
    if smallness is not None:
        weighting = weighting / smallness(dense)
    wanted = torch.autograd.grad(expected, dense.inputs, weighting)
    got = torch.autograd.grad(out, ours.inputs, weighting.to(out))
    assert_close_gradients(got, wanted, gradient_tolerance)
