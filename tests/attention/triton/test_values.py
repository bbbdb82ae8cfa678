"""Values and gradients of every kernel against the oracle."""

import pytest
import torch
from torch.nn import functional as F

from performers.attention.operators import Inputs
from performers.attention.triton import causal, launcher, passes
from tests.attention.cases import exhaustive, random_mask
from tests.attention.triton.support import TOLERANCE, check, hostile_call, small_call
from tests.features.cases import Case, GeneralizedFeatures, by_name

MODES = ("bidirectional", "causal")
FORM = {"head_dim": 12, "value_dim": 8, "num_features": 20}
EXACT = {"head_dim": 16, "value_dim": 8, "num_features": 16}
FUNCTIONS = ("relu", "exp", "elu+1", "sigmoid", "abs", "deterministic-relu", "deterministic-elu+1")
PACKED = {**EXACT, "cu_seqlens": torch.tensor([0, 1, 20, 20, 32, 65, 70], dtype=torch.int32)}
# None of a single position, whose gradients cancel to zero.
PACKED_FORM = {**FORM, "cu_seqlens": torch.tensor([0, 7, 20, 20, 36, 40], dtype=torch.int32)}
LONG = {**EXACT, "cu_seqlens": torch.tensor([0, 60, 140, 150])}
SHARED = {"heads": 2, "key_heads": 1}
BOTH = {"window": 9, "sinks": 2}
NO_KEYS = torch.tensor([[True], [False]]) & random_mask(2, 70)
LATE_KEYS = (torch.arange(75) >= 40) & random_mask(1, 75)


def of(length, mode="bidirectional", /, tolerance=TOLERANCE, **options):
    return length, mode, tolerance, options


# The gradient of a single key cancels to zero. Exponents of large inputs are in the hundreds, where
# float32 has fewer digits after the point. The interpreter truncates to bfloat16, which triples the
# error of rounding.
CALLS = {
    "one key": of(1, tolerance=2e-5),
    "a block less one": of(63, seed=63),
    "a block and one": of(65, seed=65),
    "several splits": of(150, seed=150),
    "fewer keys": of(70, "cross", size=20),
    "more keys": of(20, "cross", size=150),
    "grouped heads": of(70, batch=2, heads=6, key_heads=2),
    "projections of key heads": of(40, heads=4, key_heads=2, num_heads=2),
    "projections of query heads": of(40, heads=4, key_heads=2, num_heads=4),
    "head_dim 64": of(70, head_dim=64, value_dim=64, num_features=64),
    "wide values": of(70, head_dim=8, value_dim=40, num_features=64),
    "head_dim 128": of(70, tolerance=2e-3, head_dim=128, value_dim=5, dtype=torch.float16),
    "very wide values": of(70, tolerance=2e-3, head_dim=5, value_dim=100, dtype=torch.float16),
    "hyperbolic": of(70, tolerance=1e-5, name="hyperbolic"),
    "a bias": of(70, tolerance=1e-5, name="optimal-simplex"),
    "without the norm": of(70, tolerance=1e-5, name="exp-no-epsilon"),
    "balanced": of(70, tolerance=1e-5, name="data_aware"),
    "masked": of(70, batch=2, **SHARED, key_mask=NO_KEYS),
    "large inputs": of(100, tolerance=2e-5, heads=2, input_scale=10.0),
    "float16": of(150, tolerance=2e-3, dtype=torch.float16, seed=3),
    "bfloat16": of(150, tolerance=3e-2, dtype=torch.bfloat16, seed=3),
    "causal, one key": of(1, "causal", tolerance=2e-5),
    "causal, half a chunk": of(32, "causal", seed=32),
    "causal, and one": of(33, "causal", seed=33),
    "causal, chunks": of(75, "causal", seed=75),
    "causal, masked": of(75, "causal", **SHARED, key_mask=LATE_KEYS),
    "causal, balanced": of(70, "causal", tolerance=1e-5, name="data_aware"),
    "causal, float16": of(70, "causal", tolerance=3e-3, dtype=torch.float16, seed=3),
    "causal, bfloat16": of(70, "causal", tolerance=4e-2, dtype=torch.bfloat16, seed=3),
    "window": of(100, "causal", **EXACT, window=65, seed=65),
    "window both ways": of(70, **EXACT, window=20, seed=20),
    "window, masked": of(70, **EXACT, **SHARED, **BOTH, key_mask=random_mask(1, 70)),
    "causal window, masked": of(
        70, "causal", **EXACT, **SHARED, **BOTH, key_mask=LATE_KEYS[:, :70]
    ),
    **{f"sinks, {mode}": of(100, mode, **EXACT, sinks=18) for mode in (*MODES, "cross")},
    "window, float16": of(100, "causal", 3e-3, **EXACT, **BOTH, dtype=torch.float16),
    "window, bfloat16": of(100, "causal", 4e-2, **EXACT, **BOTH, dtype=torch.bfloat16),
    "packed": of(70, "causal", **PACKED, **SHARED),
    "packed window": of(70, "causal", **PACKED, **SHARED, **BOTH, key_mask=random_mask(1, 70)),
    "packed, one long": of(150, "causal", **LONG),
    **{name: of(40, **FORM, name=name) for name in FUNCTIONS},
    **{f"causal, {name}": of(40, "causal", **FORM, name=name) for name in ("relu", "exp", "elu+1")},
    "packed relu": of(40, name="relu", **PACKED_FORM),
    "packed exp": of(40, "causal", name="exp", **PACKED_FORM),
    **{
        f"relu, {mode}, inputs of {scale}": of(
            66, mode, **FORM, name="relu", input_scale=scale, seed=1
        )
        for mode in MODES
        for scale in (1e-3, 1e4)
    },
    **{
        f"relu, {mode}, {dtype}": of(70, mode, tolerance, **FORM, name="relu", dtype=dtype)
        for mode in MODES
        for dtype, tolerance in ((torch.float16, 3e-3), (torch.bfloat16, 4e-2))
    },
}
MORE = {
    "causal, hyperbolic": of(70, "causal", tolerance=1e-5, name="hyperbolic"),
    "causal, a bias": of(70, "causal", tolerance=1e-5, name="optimal-simplex"),
    **{f"window of {n}": of(100, "causal", **EXACT, window=n) for n in (0, 1, 63, 64, 300)},
    **{f"window of {n} both ways": of(70, **EXACT, window=n) for n in (0, 64)},
    **{f"one sink, {mode}": of(100, mode, **EXACT, sinks=1) for mode in (*MODES, "cross")},
    **{
        f"window, {name}": of(80, "causal", 1e-5, **EXACT, name=name, window=5, sinks=1)
        for name in ("hyperbolic", "optimal-simplex", "data_aware")
    },
    "packed both ways": of(70, **PACKED, **SHARED),
    "packed window both ways": of(70, **PACKED, **SHARED, **BOTH, key_mask=random_mask(1, 70)),
    **{
        f"relu, {mode}, heads": of(
            70,
            mode,
            **FORM,
            name="relu",
            heads=4,
            key_heads=2,
            num_heads=2,
            key_mask=LATE_KEYS[:, :70],
        )
        for mode in MODES
    },
}


@pytest.mark.parametrize("name", [*CALLS, *map(exhaustive, MORE)])
def test_values_and_gradients(name):
    length, mode, tolerance, options = (CALLS | MORE)[name]
    check(small_call(length, mode, **options), tolerance=tolerance)


def lost_rows(call):
    """Rows that are computed again, pair by pair."""
    return int(passes.forward(Inputs.of(call.checked())).lost.count_nonzero())


LOST = {
    "grouped heads": (hostile_call(**SHARED), 2e-5),
    "bfloat16": (hostile_call(100, dtype=torch.bfloat16), 5e-2),
    "masked": (hostile_call(100, batch=2, key_mask=random_mask(2, 100)), 2e-5),
    "packed": (hostile_call(70, cu_seqlens=PACKED["cu_seqlens"]), 2e-5),
    "window": (hostile_call(input_scale=5.0, window=3), 2e-5),
    "window both ways": (hostile_call(140, "bidirectional", input_scale=5.0, window=3), 2e-5),
}


@pytest.mark.parametrize(
    "name", [x if x in ("grouped heads", "bfloat16") else exhaustive(x) for x in LOST]
)
def test_rows_that_lose_their_pairs(name):
    call, tolerance = LOST[name]
    assert lost_rows(call) > 5 or "window" in name
    check(call, tolerance=tolerance)


def test_very_large_inputs():
    """Exponents themselves are rounded, to 6e-8 of their size."""
    check(small_call(100, heads=2, input_scale=100.0), tolerance=1e-3, gradients=False)


@pytest.mark.parametrize("name", ["positive", "relu", "exp"])
def test_keys_far_larger_than_the_rest(name):
    """Causal rows before them underflow at their scale, and are mended."""
    if name == "positive":
        call = small_call(100)
        call.key[:, :, 50] *= 30
        call.key[:, :, 60:] *= 1e-3
    else:
        case = bare(name) if name == "relu" else name
        call = small_call(50, "causal", name=case, **{**FORM, "num_features": 5})
        call.key[..., 40:, :] *= 30.0 if name == "exp" else 1e20
    check(call, tolerance=2e-5, gradients=name != "relu")


def test_keys_whose_norm_overflows():
    call = small_call(70)
    call.key[:, :, 3] = 1e25
    out = call.run("triton")
    left = torch.arange(70) != 3
    without = call.with_inputs(call.query, call.key[:, :, left], call.value[:, :, left])
    assert (out - without.run("triton")).abs().max() < TOLERANCE
    leaves = call.leaves()
    grads = torch.autograd.grad(leaves.run("triton").sum(), leaves.inputs)
    assert all(x.isfinite().all() for x in grads)


def bare(name: str) -> Case:
    """The same function without an epsilon, so that features can be zero."""
    case = by_name(name)

    def build(head_dim, num_features, **options):
        return GeneralizedFeatures(head_dim, num_features, fn=name, epsilon=0.0, **options)

    def log_phi(feature_map, x, *, is_query=False):
        log, base = case.log_phi(feature_map, x)
        return log, base - case.epsilon

    return Case(f"{name} without epsilon", build, log_phi, function=case.function)


@pytest.mark.parametrize("name", ["relu", exhaustive("abs")])
def test_features_without_an_epsilon(name):
    """Also rows and keys all of whose features are zero, which count as rows without keys."""
    for mode in MODES:
        call = small_call(66, mode, name=bare(name), seed=2, **{**FORM, "num_features": 3})
        if name == "relu":
            empty = (call.query * 12**-0.25 @ call.feature_map.weight[0].mT <= 0).all(-1)
            assert empty.any()
        out, expected = call.run("triton"), call.run("torch")
        assert (out - expected).abs().max() < TOLERANCE
        leaves = call.leaves()
        got, wanted = (
            torch.autograd.grad(leaves.run(backend).square().sum(), leaves.inputs)
            for backend in ("triton", "torch")
        )
        # Both round, and rows of few features that are nearly zero magnify it.
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).abs().max() < 2e-5 * b.abs().max()


@pytest.mark.parametrize("name", ["sigmoid", "elu+1"])
def test_features_that_vanish_without_an_epsilon(name):
    """Their slopes are no 0 / 0, also those of features that fill up a block."""
    call = small_call(40, name=bare(name), **FORM)
    check(call)
    large = call.with_inputs(*(40 * x for x in call.inputs)).leaves()
    grads = torch.autograd.grad(large.run("triton").sum(), large.inputs)
    assert all(x.isfinite().all() for x in grads)


def test_two_softmax_attentions():
    """FAVOR is keys against the features, then queries against the features."""
    call = small_call(100)
    query, key, value = (x.double() for x in call.inputs)
    weight = call.feature_map.weight.double() * 24**-0.25
    logits = weight @ key.mT - key.square().sum(-1).unsqueeze(-2) * 24**-0.5 / 2
    sums = logits.softmax(-1) @ value
    rows = query @ weight.mT + logits.logsumexp(-1).unsqueeze(-2)
    assert (call.run("triton") - rows.softmax(-1) @ sums).abs().max() < TOLERANCE


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_window_that_covers_the_sequence_is_softmax_attention(is_causal):
    call = small_call(100, **EXACT, window=100, is_causal=is_causal)
    exact = F.scaled_dot_product_attention(*call.inputs, is_causal=is_causal)
    assert (call.run("triton") - exact).abs().max() < TOLERANCE


def with_gradients(call):
    out = call.run("triton")
    return out, *torch.autograd.grad(out.square().sum(), call.inputs)


def test_one_head_of_many_splits_equals_one_split(monkeypatch):
    call, results = small_call(100, "causal").leaves(), []
    for span in (64, 1000):
        monkeypatch.setattr(launcher, "LEAST_SPAN", span)
        results.append(with_gradients(call))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 2e-6 * max(1, b.abs().max())


@pytest.mark.exhaustive
def test_heads_in_groups(monkeypatch):
    """The size of a group of heads does not change a bit."""
    call, results = small_call(70, "causal", heads=4, key_heads=2).leaves(), []
    for size in (1 << 29, 1):
        monkeypatch.setattr(causal, "STATE_BYTES", size)
        results.append(with_gradients(call))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "call", [small_call(150), exhaustive(hostile_call(100))], ids=["plain", "lost"]
)
def test_two_runs_are_equal(call):
    call = call.leaves()
    first, second = with_gradients(call), with_gradients(call)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_layouts():
    """Strides of any order, also of gradients, and results in the order of the query."""
    call = small_call(20, batch=2, heads=2).leaves()
    expected = with_gradients(call)
    for dims in ((1, 2), (2, 3)):
        views = [x.detach().transpose(*dims).contiguous().transpose(*dims) for x in call.inputs]
        found = with_gradients(call.with_inputs(*(x.requires_grad_() for x in views)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert dims == (2, 3) or found[0].transpose(1, 2).is_contiguous()


def test_query_heads_beyond_2_to_the_31():
    """The third of those that share a key head; of its memory only what it touches is real."""
    call = small_call(5, "causal", heads=3, key_heads=1, dtype=torch.float16).leaves()
    query = torch.empty_strided((1, 3, 5, 24), (0, 2**30, 24, 1), dtype=torch.float16)
    query.copy_(call.query.detach()).requires_grad_()
    far = call.with_inputs(query, call.key, call.value)
    results = [with_gradients(x) for x in (call, far)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"size": 0, "mode": "cross"}, {"value_dim": 0}])
def test_nothing_to_attend_to(sizes):
    call = small_call(10, **sizes)
    assert torch.equal(call.run("triton"), call.run("torch"))
