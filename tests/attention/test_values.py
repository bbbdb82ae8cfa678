"""Values and gradients of every backend against the dense oracle."""

import copy
import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from performers import SoftmaxFeatures, use_backend
from performers.features import FeatureForm
from tests.attention.cases import (
    BACKENDS,
    BOTH,
    CASES,
    EVERY,
    LINEAR,
    LISTED,
    MODES,
    PLAIN,
    POSITIVE,
    VALUE_TOLERANCE,
    assert_equal,
    check_against_oracle,
    exhaustive,
    law,
    make_call,
    random_mask,
    refusal,
    stream,
    trained,
    with_gradients,
)
from tests.attention.oracle import visible
from tests.features.cases import by_name, generator

# Scales, of which four at head_dim 16 is sixteen times the default, and shares of the keys that
# take part.
VARIANTS = [(None, None), (0.0, None), (1.0, None), (4.0, None), (None, 0.02), (None, 0.98)]


@pytest.mark.parametrize(("scale", "share"), VARIANTS)
@law(cases=EVERY)
def test_equals_the_oracle(backend, case, configuration, mode, scale, share, device):
    """Positions count, not keys that take part: a hole in a window is a hole."""
    options = {"scale": scale, "input_scale": 1.0 if scale is None else 0.7, "device": device}
    call = make_call(case, 129, mode, configuration, **options)
    if share is not None:
        mask = random_mask(call.key.shape[0], call.key.shape[2], 2, share)
        call.options["key_mask"] = mask.to(device)
    tolerance = 1e-4 if scale == 4 else VALUE_TOLERANCE
    check_against_oracle(call, backend, value_tolerance=tolerance, gradients=scale != 4)


@pytest.mark.parametrize("dtype", [torch.float64])
@law()
def test_float64(backend, case, configuration, mode, dtype, device):
    """To ten digits, so that the gradients are those of the formula."""
    call = make_call(case, 70, mode, configuration, dtype=dtype, seed=4, device=device)
    assert call.run(backend).dtype == dtype
    # Balanced queries and keys have their exact products to the rounding of the float32 transforms.
    tolerance = 1e-6 if case.calibrated and configuration.exact else 1e-10
    check_against_oracle(call, backend, value_tolerance=tolerance, gradient_tolerance=tolerance)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["positive", "relu"])
@law(backends=["torch"])
def test_more_than_one_block(backend, name, configuration, mode, device):
    call = make_call(by_name(name), 200, mode, configuration, seed=2, size=190, device=device)
    call.options["key_mask"] = random_mask(*call.key.shape[:3:2], share=0.9).to(device)
    check_against_oracle(call, backend)


@pytest.mark.parametrize("name", ["positive", "relu"])
@law(backends=LINEAR)
def test_trained_projections(backend, name, configuration, mode, device):
    """Their gradients too, against the reference in float64."""
    results = []
    for dtype, other, where in (
        (torch.float64, "reference", "cpu"),
        (torch.float32, backend, device),
    ):
        call = make_call(by_name(name), 129, mode, configuration, device=where)
        call.feature_map.to(dtype)
        if name == "relu":
            parameters = [call.feature_map.weight.requires_grad_()]
        else:
            parameters = list(trained(call).feature_map.parameters())
        call = call.leaves(dtype)
        out = call.run(other)
        weight = torch.randn(out.shape, generator=generator(1), dtype=torch.float64).to(out)
        results.append((out, *torch.autograd.grad(out, [*call.inputs, *parameters], weight)))
    for expected, got in zip(*results, strict=True):
        error = (got.cpu().double() - expected).abs().max()
        assert error <= 5e-5 * max(expected.abs().max(), 0.3)


@law()
def test_two_runs_agree_to_the_bit_and_leave_inputs_alone(backend, case, configuration, mode):
    call = make_call(case, 150, mode, configuration, seed=6).leaves()
    mask = call.options["key_mask"] = random_mask(*call.key.shape[:3:2])
    before, results = [x.detach().clone() for x in (*call.inputs, mask)], []
    for _ in range(2):
        out = call.run(backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), call.inputs)))
    assert_equal(*results)
    assert_equal(before, (*call.inputs, mask))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("length", [50, 150])
@pytest.mark.parametrize("name", ["positive", "bias", "hyperbolic", "relu"])
@law(backends=LINEAR, configurations=[PLAIN, BOTH])
def test_a_redraw_before_the_backward_pass(backend, name, configuration, mode, length):
    """Gradients are those of the features of the forward pass, also where they are recomputed."""
    call = make_call(CASES[name], length, mode, configuration, seed=3).leaves()
    gradients = []
    for redraw in (False, True):
        call.feature_map = copy.deepcopy(call.feature_map)
        out = call.run(backend)
        if redraw:
            for buffer in call.feature_map.buffers():
                buffer.add_(1)
        gradients.append(torch.autograd.grad(out.square().sum(), call.inputs))
    assert_equal(*gradients)


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("query", "value")])
@law(configurations=[PLAIN, BOTH])
def test_only_some_inputs_want_gradients(backend, mode, configuration, wanted):
    call = make_call(POSITIVE, 130, mode, configuration, seed=1)
    names = ("query", "key", "value")
    weight = torch.randn(call.run(backend).shape, generator=generator(2))
    expected = dict(zip(names, with_gradients(call, backend, weight)[1:], strict=True))
    for name in wanted:
        getattr(call, name).requires_grad_()
    call.run(backend).backward(weight)
    for name in names:
        gradient = getattr(call, name).grad
        assert (gradient is None) == (name not in wanted)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_under_grad_mode(backend):
    call = make_call(POSITIVE, 20, "causal").leaves()
    with torch.no_grad():
        assert not call.run(backend).requires_grad
    with torch.inference_mode():
        out = call.run(backend)
    assert torch.equal(out, call.run(backend))


@law(configurations=[PLAIN, LISTED])
def test_second_derivatives(mode, configuration):
    """Of the torch backend; the kernels say that they have none."""
    call = make_call(POSITIVE, 20, mode, configuration).leaves()
    for backend in LINEAR:
        with use_backend(backend):
            (gradient,) = torch.autograd.grad(call.run().sum(), call.key, create_graph=True)
        if backend == "native":
            with pytest.raises(NotImplementedError, match=r"second derivative.*backend"):
                gradient.square().sum().backward()
        elif not configuration.listed:
            gradient.square().sum().backward()
            assert call.key.grad.isfinite().all()


@law(configurations=[PLAIN, BOTH])
def test_transforms_of_functions(mode, configuration):
    """``torch.func``, which cannot recompute, and forward mode choose the torch backend."""
    call = make_call(POSITIVE, 100, mode, configuration)

    def loss(query):
        return call.with_inputs(query, call.key, call.value).run().square().sum()

    query = call.query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(query), query)
    torch.testing.assert_close(torch.func.grad(loss)(call.query), expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn(query.shape, generator=generator(0))
    _, slope = torch.func.jvp(loss, (call.query,), (direction,))
    torch.testing.assert_close(slope, (expected * direction).sum(), rtol=1e-4, atol=1e-3)


WIDTHS = (1, 3, 5, 16, 17, 63, 64, 65, 130)
NUM_FEATURES = (1, 2, 3, 4, 5, 6, 7, 16, 17, 47, 48, 49, 97)
LENGTHS = st.sampled_from((1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 193)) | st.integers(1, 200)
NAMES = ("positive", "relu", "bias", "exp-no-epsilon", "trigonometric", "exp")
SMALLEST = {
    "name": "positive", "mode": "causal", "length": 1, "size": 1, "head_dim": 1, "value_dim": 1,
    "num_features": 1, "heads": 1, "key_heads": 1, "num_heads": None, "masked": False, "seed": 0,
    "options": {}, "pieces": None,
}  # fmt: skip

SINGLES = {"cu_seqlens": torch.arange(141)}


@st.composite
def shapes(draw, backend):
    groups, key_heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2), (1, 3)]))
    name = draw(st.sampled_from([n for n in NAMES if refusal(backend, CASES[n]) is None]))
    mode, length = draw(st.sampled_from(MODES)), draw(LENGTHS)
    pieces, options = None, {}
    if CASES[name].softmax:
        if mode != "cross":
            options["window"] = draw(st.none() | st.sampled_from((0, 1, 20, 63, 64, 65, 100, 500)))
        options["sinks"] = draw(st.sampled_from((0, 0, 1, 3, 66, 300)))
    cuts = sorted(draw(st.lists(st.sampled_from((0, 1, 64)) | st.integers(0, length), max_size=5)))
    ends = [0, *(min(x, length) for x in cuts), length]
    if mode != "cross" and draw(st.booleans()):
        options["cu_seqlens"] = torch.tensor(ends)
    elif mode == "causal":
        pieces = [stop - start for start, stop in itertools.pairwise(ends)]
    return {
        "name": name,
        "mode": mode,
        "length": length,
        "size": draw(LENGTHS),
        "head_dim": draw(st.sampled_from(WIDTHS)),
        "value_dim": draw(st.sampled_from(WIDTHS)),
        # Sines and cosines come in pairs.
        "num_features": draw(st.sampled_from(NUM_FEATURES)) * (2 if name == "trigonometric" else 1),
        "heads": groups * key_heads,
        "key_heads": key_heads,
        "num_heads": draw(st.sampled_from([None, key_heads, groups * key_heads])),
        "masked": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
        "options": options,
        "pieces": pieces,
    }


@pytest.mark.parametrize("examples", [50, exhaustive(300)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, examples):
    """Sizes of vectors, tiles, panels and blocks, and between; whole, packed or resumed."""

    @settings(
        max_examples=examples if backend == "native" else examples // 3,
        derandomize=True,
        database=None,
    )
    @example(SMALLEST)
    @example(SMALLEST | {"name": "relu", "length": 65, "value_dim": 130})
    @example(SMALLEST | {"mode": "cross", "length": 129, "size": 1, "head_dim": 130})
    @example(SMALLEST | {"length": 172, "pieces": [130] + [1] * 42, "options": {"window": 5}})
    @example(SMALLEST | {"length": 140, "options": SINGLES | {"window": 4, "sinks": 2}})
    @given(shapes(backend))
    def check(shape):
        check_shape(backend, **shape)

    check()


def check_shape(backend, name, mode, length, masked, seed, options, pieces, **sizes):
    call = make_call(CASES[name], length, mode, batch=1, seed=seed, **sizes, **options)
    if masked:
        call.options["key_mask"] = random_mask(1, call.key.shape[2], seed)
    check_against_oracle(
        call,
        backend,
        value_tolerance=4e-5,
        # Gradients are sums of as many terms as a value has entries.
        gradient_tolerance=2e-4 * max(1.0, sizes["value_dim"] / 16) ** 0.5,
        run=None if pieces is None else lambda call: stream(call, pieces, backend)[0],
        smallness=smallness,
    )


def smallness(call):
    """By what factor small features make the gradients of a row's features large, ``(B, H, L, 1)``.

    A feature's gradient is ``(grad . v_j - grad . out_i)`` times ``phi_f(k_j) / normaliser_i``
    summed over keys, a key's the same with ``phi_f(q_i)``; the rounding of ``grad . out`` grows by
    the same quotients. Where the feature itself is a factor of its derivative, as in an
    exponential, they cancel; where it is not, in a ReLU as small as its epsilon, they are large.
    """
    if call.case.name != "relu":
        return torch.ones(())
    root = call.query.shape[-1] ** -0.25
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    features = []
    for x in (call.query, key):
        log, base = call.case.log_phi(call.feature_map, x * root)
        features.append(base * log.exp())
    who = {name: x for name, x in call.options.items() if name not in ("window", "sinks")}
    sums = visible(call.query.shape[-2], call.key.shape[-2], **who).double() @ features[1]
    normaliser = (features[0] * sums).sum(-1, keepdim=True)
    largest = torch.maximum(features[0], sums).amax(-1, keepdim=True)
    return (largest / normaliser).where(normaliser > 0, 1.0).clamp_min(1.0).detach()


@pytest.mark.parametrize("seed", range(2))
@law(backends=LINEAR)
def test_gradients_that_one_small_feature_cancels(backend, mode, seed):
    """With one feature outputs depend on values alone, whatever the feature is divided by."""
    sizes = {"head_dim": 1, "value_dim": 63, "num_features": 1, "heads": 6, "key_heads": 2}
    check_shape(backend, "relu", mode, 128, False, seed, {}, None, **sizes)


@pytest.mark.parametrize("epsilon", [1e-3, 1.0, 1e4])
@law(backends=LINEAR)
def test_a_large_epsilon_hides_no_slope(backend, mode, epsilon):
    call = make_call(by_name("relu"), 70, mode)
    call.feature_map.epsilon = epsilon
    weight = torch.randn(call.run().shape, generator=generator(5))
    got, wanted = (with_gradients(call, name, weight)[1:] for name in (backend, "reference"))
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * max(theirs.abs().max(), 1 / epsilon)


class _SharedBias(SoftmaxFeatures):
    """A projection for each head, one bias for all."""

    def form(self) -> FeatureForm:
        return super().form()._replace(bias=torch.linspace(-1, 1, self.num_features)[None])


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("backend", LINEAR)
def test_one_bias_for_all_heads(backend, length):
    call = make_call(POSITIVE, length, "causal", heads=3)
    call.feature_map = _SharedBias(16, 24, num_heads=3)
    torch.testing.assert_close(call.run(backend), call.run("reference"), rtol=0, atol=2e-5)
