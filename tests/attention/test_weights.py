"""``favor_attention_weights``: the matrix that the outputs imply."""

import pytest
import torch

from performers import favor_attention, favor_attention_weights
from tests.attention import oracle
from tests.attention.cases import ALL, FEW, MODES, TESTED, covers, make_call, random_mask
from tests.features.cases import by_name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_rows_sum_to_one_and_give_the_outputs(case, mode, masked):
    call = make_call(case, 70, mode, heads=4, key_heads=2, seed=1)
    if masked:
        call.options["key_mask"] = random_mask(2, call.key.shape[2], seed=1)
        call.options["key_mask"][1, :3] = False
    expected, conditioning = oracle.weights(
        case, call.feature_map, call.query, call.key, **call.options
    )
    weights = favor_attention_weights(call.query, call.key, call.feature_map, **call.options)
    assert weights.shape == (2, 4, 70, call.key.shape[2])
    assert weights.dtype == torch.float32
    size = conditioning * (1 + expected.abs().amax(-1, keepdim=True))
    assert ((weights - expected).abs() <= 1e-6 * size).all()
    seen = oracle.visible(70, call.key.shape[2], **call.options)
    assert (weights[~seen.expand_as(weights)] == 0).all()
    sums = weights.double().sum(-1)
    has_keys = seen.any(-1).expand_as(sums)
    assert ((sums - 1).abs() <= 1e-5 * size[..., 0])[has_keys].all()
    assert (sums[~has_keys] == 0).all()
    value = call.value.repeat_interleave(2, dim=1)
    for backend in [name for name in TESTED if covers(name, case)]:
        out = call.run(backend)
        bound = 2e-5 * conditioning * (1 + out.abs().amax(-1, keepdim=True))
        assert ((weights @ value - out).abs() <= bound).all()


@pytest.mark.parametrize("scale", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_scale(case, scale):
    call = make_call(case, 20, seed=2)
    expected, conditioning = oracle.weights(
        case, call.feature_map, call.query, call.key, scale=scale
    )
    weights = favor_attention_weights(call.query, call.key, call.feature_map, scale=scale)
    size = conditioning * (1 + expected.abs().amax(-1, keepdim=True))
    assert ((weights - expected).abs() <= 1e-6 * size).all()


def test_many_features_approach_softmax():
    call = make_call(
        by_name("hyperbolic"), 20, head_dim=4, num_features=50_000, input_scale=0.5, seed=3
    )
    weights = favor_attention_weights(call.query, call.key, call.feature_map)
    exact = (call.query @ call.key.mT / 2).softmax(-1)
    assert (weights - exact).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_follows_the_query(dtype):
    call = make_call(by_name("positive"), 20, dtype=dtype)
    assert favor_attention_weights(call.query, call.key, call.feature_map).dtype == dtype


def test_empty():
    call = make_call(by_name("positive"), 4, "cross", size=0)
    assert favor_attention_weights(call.query, call.key, call.feature_map).shape == (2, 2, 4, 0)


def test_gradients_reach_queries_and_keys():
    call = make_call(by_name("positive"), 20, dtype=torch.float64).leaves()
    value = torch.randn(2, 2, 20, 3, dtype=torch.float64)
    implied = favor_attention_weights(call.query, call.key, call.feature_map) @ value
    direct = favor_attention(call.query, call.key, value, call.feature_map)
    weight = torch.randn_like(direct)
    for a, b in zip(
        torch.autograd.grad(implied, call.inputs[:2], weight),
        torch.autograd.grad(direct, call.inputs[:2], weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
