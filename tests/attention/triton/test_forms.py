"""Features that are more than exponentials: ReLU and other functions, and exp with an epsilon."""

import math

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import Call, exhaustive, generator, make_call, random_mask, stream
from tests.attention.triton.support import TOLERANCE, check
from tests.features.cases import Case, GeneralizedFeatures, by_name

NAMES = ("relu", "exp", "elu+1", "sigmoid", "abs", "deterministic-relu", "deterministic-elu+1")
MODES = ("bidirectional", "causal")


def form_call(name: str | Case, length: int, mode: str = "causal", **options) -> Call:
    """One batch row and head, a head_dim of 12 and 20 features, each ragged."""
    case = by_name(name) if isinstance(name, str) else name
    sizes = {"batch": 1, "heads": 1, "head_dim": 12, "num_features": 20}
    return make_call(case, length, mode, **{**sizes, **options})


def bare(name: str) -> Case:
    """The same function without an epsilon, so that features can be zero."""
    case = by_name(name)

    def build(head_dim, num_features, **options):
        return GeneralizedFeatures(head_dim, num_features, fn=name, epsilon=0.0, **options)

    def log_phi(feature_map, x, *, is_query=False):
        log, base = case.log_phi(feature_map, x)
        return log, base - case.epsilon

    return Case(f"{name} without epsilon", build, log_phi, function=case.function)


@pytest.mark.parametrize("name", NAMES)
def test_bidirectional(name):
    check(form_call(name, 40, "bidirectional"))


@pytest.mark.parametrize("name", ["relu", "exp", "elu+1"])
def test_causal(name):
    check(form_call(name, 40))


@pytest.mark.exhaustive
def test_projections_of_heads_and_masks():
    for mode in MODES:
        call = form_call("relu", 70, mode, heads=4, key_heads=2, num_heads=2)
        call.options["key_mask"] = random_mask(1, 70)
        call.options["key_mask"][:, :20] = False
        check(call)


@pytest.mark.parametrize(("name", "mode"), [("relu", "bidirectional"), ("exp", "causal")])
def test_packed_sequences(name, mode):
    # None of a single position, whose gradients cancel to zero.
    offsets = torch.tensor([0, 7, 20, 20, 36, 40], dtype=torch.int32)
    check(form_call(name, 40, mode, cu_seqlens=offsets))


@pytest.mark.parametrize("name", ["relu", exhaustive("abs")])
def test_features_without_an_epsilon(name):
    """Also rows and keys all of whose features are zero, which count as rows without keys."""
    for mode in MODES:
        call = form_call(bare(name), 66, mode, num_features=3, seed=2)
        feature_map, root = call.feature_map, 12**-0.25
        if name == "relu":
            empty = (call.query * root @ feature_map.weight[0].mT <= 0).all(-1)
            assert empty.any()
        out, expected = call.run("triton"), call.run("torch")
        assert (out - expected).abs().max() < TOLERANCE
        leaves = call.leaves()
        got, wanted = (
            torch.autograd.grad(leaves.run(backend).square().sum(), leaves.inputs)
            for backend in ("triton", "torch")
        )
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_inputs_of_other_sizes(scale):
    for mode in MODES:
        check(form_call("relu", 66, mode, input_scale=scale, seed=1))


@pytest.mark.parametrize("name", ["sigmoid", "elu+1"])
def test_features_that_vanish_without_an_epsilon(name):
    """Their slopes are no 0 / 0, also those of features that fill up a block."""
    call = form_call(bare(name), 40, "bidirectional")
    check(call)
    large = call.with_inputs(*(40 * x for x in call.inputs)).leaves()
    grads = torch.autograd.grad(large.run("triton").sum(), large.inputs)
    assert all(x.isfinite().all() for x in grads)


def test_one_key_much_larger_than_the_rest():
    """Rows before it underflow at its scale, and are mended."""
    for name in ("relu", "exp"):
        call = form_call(name if name == "exp" else bare(name), 50, num_features=5)
        call.key[..., 40:, :] *= 30.0 if name == "exp" else 1e20
        check(call, tolerance=2e-5, gradients=name == "exp")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("relu", torch.bfloat16), exhaustive("relu", torch.float32), exhaustive("exp", torch.float32)],
)
def test_later_tokens_do_not_matter(name, dtype):
    """In 16-bit types not one bit, unless a feature grows so much that rows are mended."""
    call = form_call(name, 100, dtype=dtype)
    before = call.run("triton")
    for factor in (30.0, 1e4):
        inputs = [x.clone() for x in call.inputs]
        for x in inputs:
            x[..., 70:, :] *= factor
        after = favor_attention(*inputs, call.feature_map, backend="triton", is_causal=True)
        a, b = before[..., :70, :], after[..., :70, :]
        if dtype == torch.float32:
            assert (a - b).abs().max() < 2e-6
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 4e-2)])
def test_half_precision(dtype, tolerance):
    for mode in MODES:
        check(form_call("relu", 70, mode, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("name", ["relu", exhaustive("exp")])
def test_streams_and_states_of_other_backends(name):
    call = form_call(name, 78, heads=2, key_heads=1)
    whole = call.run("torch", is_causal=True)
    out, state = stream(call, [70, 1, 1, 6], "triton")
    assert (out - whole).abs().max() < TOLERANCE
    _, expected = stream(call, [78], "torch")
    for name in ("key_value", "key_sum"):
        ours, theirs = (
            getattr(x, name) * x.log_scale.exp().view(*x.log_scale.shape, *[1] * (name[-1] == "e"))
            for x in (state, expected)
        )
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    if call.feature_map.form().kind == "elementwise":
        assert (state.log_scale == 0).all()
    first, second = ([x[:, :, rows] for x in call.inputs] for rows in (slice(70), slice(70, 78)))
    for a, b in (("torch", "triton"), ("triton", "torch")):
        options = {"is_causal": True, "return_state": True}
        _, state = favor_attention(*first, call.feature_map, backend=a, **options)
        out, _ = favor_attention(*second, call.feature_map, backend=b, state=state, **options)
        assert (out - whole[:, :, 70:]).abs().max() < TOLERANCE


def test_gradients_through_states():
    call = form_call("relu", 80)
    weight = torch.randn(1, 1, 80, 8, generator=generator(1))
    found = []
    for backend in ("triton", "torch"):
        leaves = call.leaves()
        out, state = stream(leaves, [70, 10], backend)
        total = (out * weight).sum() + state.key_value.sin().sum() + state.key_sum.cos().sum()
        found.append(torch.autograd.grad(total, leaves.inputs))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity(mode):
    call = form_call("relu", 70, mode, batch=2)
    for row, bad in enumerate((math.nan, math.inf)):
        call.query[row, 0, 50, 3] = bad
        if mode == "causal":
            call.key[row, 0, 60, 3] = bad
    out, expected = call.run("triton"), call.run("reference")
    assert torch.equal(out.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert (out[kept] - expected[kept]).abs().max() < TOLERANCE
