"""Every size against the dense oracle: of vectors, tiles, panels and blocks, and between."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.attention.cases import (
    ALL,
    assert_close_gradients,
    assert_close_rows,
    make_call,
    random_mask,
    upstream,
)
from tests.attention.native.support import NATIVE
from tests.attention.oracle import visible

pytestmark = NATIVE

CASES = {case.name: case for case in ALL}
WIDTHS = (1, 3, 5, 16, 17, 63, 64, 65, 130)
NUM_FEATURES = (1, 2, 3, 4, 5, 6, 7, 16, 17, 47, 48, 49, 97)
EDGES = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 193)
lengths = st.sampled_from(EDGES) | st.integers(1, 200)


@st.composite
def shapes(draw):
    groups, key_heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2)]))
    name = draw(st.sampled_from(["positive", "relu", "bias", "exp-no-epsilon"]))
    return {
        "name": name,
        "mode": draw(st.sampled_from(["bidirectional", "causal", "cross"])),
        "length": draw(lengths),
        "size": draw(lengths),
        "head_dim": draw(st.sampled_from(WIDTHS)),
        "value_dim": draw(st.sampled_from(WIDTHS)),
        "num_features": draw(st.sampled_from(NUM_FEATURES)),
        "heads": groups * key_heads,
        "key_heads": key_heads,
        "num_heads": draw(st.sampled_from([None, key_heads])),
        "masked": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


def smallness(call):
    """By what factor small features make the gradients of a row's features large, ``(B, H, L, 1)``.

    A feature's gradient is ``(grad . v_j - grad . out_i)`` times ``phi_f(k_j) / normaliser_i``
    summed over keys, a key's the same with ``phi_f(q_i)``; the rounding of ``grad . out`` grows by
    the same quotients. Where the feature itself is a factor of its derivative, as in an
    exponential, they cancel; where it is not, in a ReLU as small as its epsilon, they are large.
    """
    if call.case.name != "relu":
        return torch.ones(())
    heads, key_heads = call.query.shape[1], call.key.shape[1]
    root = call.query.shape[-1] ** -0.25
    key = call.key.double().repeat_interleave(heads // key_heads, dim=1)
    features = []
    for x in (call.query.double(), key):
        log, base = call.case.log_phi(call.feature_map, x * root)
        features.append(base * log.exp())
    seen = visible(
        call.query.shape[-2],
        call.key.shape[-2],
        is_causal=call.options.get("is_causal", False),
        key_mask=call.options.get("key_mask"),
    )
    sums = seen.double() @ features[1]
    normaliser = (features[0] * sums).sum(-1, keepdim=True)
    largest = torch.maximum(features[0], sums).amax(-1, keepdim=True)
    return (largest / normaliser).where(normaliser > 0, 1.0).clamp_min(1.0).detach()


def check(name, mode, length, masked, seed, **sizes):
    call = make_call(CASES[name], length, mode, batch=1, seed=seed, **sizes)
    if masked:
        call.options["key_mask"] = random_mask(1, call.key.shape[2], seed)
    ours, dense = call.leaves(), call.leaves(torch.float64)
    expected, conditioning = dense.expected()
    out = ours.run("native")
    assert_close_rows(out.detach(), expected.detach(), conditioning, 4e-5)
    # Rows are weighted so that the gradient of each, and its rounding, is of order one.
    weight = upstream(expected, conditioning) / smallness(call)
    wanted = torch.autograd.grad(expected, dense.inputs, weight)
    got = torch.autograd.grad(out, ours.inputs, weight.to(out.dtype))
    # Gradients are sums of as many terms as a value has entries.
    assert_close_gradients(got, wanted, 2e-4 * max(1.0, sizes["value_dim"] / 16) ** 0.5)


SMALLEST = {
    "name": "positive",
    "mode": "causal",
    "length": 1,
    "size": 1,
    "head_dim": 1,
    "value_dim": 1,
    "num_features": 1,
    "heads": 1,
    "key_heads": 1,
    "num_heads": None,
    "masked": False,
    "seed": 0,
}


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@example(SMALLEST)
@example(SMALLEST | {"name": "relu", "length": 65, "value_dim": 130})
@example(SMALLEST | {"mode": "cross", "length": 129, "size": 1, "head_dim": 130})
@given(shapes())
def test_any_shape(shape):
    check(**shape)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_gradients_that_one_small_feature_cancels(mode, seed):
    """With one feature outputs depend on values alone, whatever the feature is divided by."""
    sizes = {"head_dim": 1, "value_dim": 63, "num_features": 1, "heads": 6, "key_heads": 2}
    check("relu", mode, 128, False, seed, **sizes)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("num_features", NUM_FEATURES)
def test_any_number_of_features(num_features, mode):
    """A panel holds 48; the last one is what is left over."""
    for name in ("positive", "relu"):
        sizes = {"head_dim": 17, "value_dim": 5, "num_features": num_features, "heads": 1}
        check(name, mode, 65, False, num_features, **sizes)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_any_width(mode, width):
    for sizes in ({"head_dim": width, "value_dim": 16}, {"head_dim": 16, "value_dim": width}):
        check("positive", mode, 70, True, width, heads=1, num_features=20, **sizes)


@pytest.mark.parametrize("value_dim", WIDTHS)
@pytest.mark.parametrize("case", ["positive", "relu"])
def test_a_step_of_any_width(case, value_dim):
    """One position takes a way of its own: with a past, without, with its key masked."""
    call = make_call(CASES[case], 66, "causal", value_dim=value_dim, heads=4, key_heads=2)
    expected, _ = call.expected()
    _, state = call.run("native", return_state=True)
    first = [x[..., :1, :] for x in call.inputs]
    alone = type(call)(call.case, call.feature_map, *first, {"is_causal": True})
    torch.testing.assert_close(
        alone.run("native").double(), expected[..., :1, :], atol=2e-6, rtol=0
    )
    masked = alone.run("native", key_mask=torch.tensor([[True], [False]]))
    torch.testing.assert_close(masked[0].double(), expected[0, :, :1], atol=2e-6, rtol=0)
    assert (masked[1] == 0).all()
    skipped, after = alone.run(
        "native", state=state, return_state=True, key_mask=torch.zeros(2, 1, dtype=torch.bool)
    )
    wanted = alone.run("reference", state=state, key_mask=torch.zeros(2, 1, dtype=torch.bool))
    torch.testing.assert_close(skipped, wanted, atol=1e-5, rtol=0)
    for name in ("key_value", "key_sum", "log_scale"):
        assert torch.equal(getattr(after, name), getattr(state, name))
