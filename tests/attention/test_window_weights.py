"""``favor_attention_weights`` with windows and sinks: the matrix that the outputs imply."""

import pytest
import torch

from performers import favor_attention_weights
from tests.attention import oracle
from tests.attention.cases import EXACT, MODES, TESTED, covers, make_call, random_mask
from tests.features.cases import by_name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_rows_sum_to_one_and_give_the_outputs(case, mode, masked):
    terms = {"sinks": 3} if mode == "cross" else {"window": 6, "sinks": 3}
    call = make_call(case, 70, mode, heads=4, key_heads=2, seed=1)
    if masked:
        call.options["key_mask"] = random_mask(2, call.key.shape[2], seed=1)
        call.options["key_mask"][1, :3] = False
    seen = oracle.visible(70, call.key.shape[2], **call.options)
    call.options |= terms
    expected, conditioning = oracle.weights(
        case, call.feature_map, call.query, call.key, **call.options
    )
    weights = favor_attention_weights(call.query, call.key, call.feature_map, **call.options)
    assert weights.shape == (2, 4, 70, call.key.shape[2])
    assert weights.dtype == torch.float32
    size = conditioning * (1 + expected.abs().amax(-1, keepdim=True))
    assert ((weights - expected).abs() <= 1e-6 * size).all()
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


@pytest.mark.parametrize("terms", [{"window": 70}, {"sinks": 70}], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_terms_over_everything_are_softmax(is_causal, terms):
    call = make_call(by_name("positive"), 70, num_features=4)
    logits = call.query @ call.key.mT * 0.3
    if is_causal:
        logits = logits.masked_fill(torch.ones(70, 70).triu(1) > 0, -torch.inf)
    weights = favor_attention_weights(
        call.query, call.key, call.feature_map, scale=0.3, is_causal=is_causal, **terms
    )
    torch.testing.assert_close(weights, logits.softmax(-1), rtol=0, atol=1e-6)


def test_gradients_reach_queries_and_keys():
    call = make_call(by_name("positive"), 30, dtype=torch.float64, window=4, sinks=2).leaves()
    value = torch.randn(2, 2, 30, 8, dtype=torch.float64)
    call.value = value
    implied = (
        favor_attention_weights(call.query, call.key, call.feature_map, **call.options) @ value
    )
    direct = call.run("torch")
    weight = torch.randn_like(direct)
    for a, b in zip(
        torch.autograd.grad(implied, call.inputs[:2], weight),
        torch.autograd.grad(direct, call.inputs[:2], weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_follows_the_query(dtype):
    call = make_call(by_name("positive"), 20, dtype=dtype)
    weights = favor_attention_weights(call.query, call.key, call.feature_map, window=3, sinks=1)
    assert weights.dtype == dtype


def test_empty():
    call = make_call(by_name("positive"), 4, "cross", size=0)
    weights = favor_attention_weights(call.query, call.key, call.feature_map, sinks=2)
    assert weights.shape == (2, 2, 4, 0)
