"""``favor_attention_weights``: the matrix that the outputs imply."""

import pytest
import torch

from performers import favor_attention_weights
from tests.attention import oracle
from tests.attention.cases import (
    BOTH,
    CONFIGURATIONS,
    LINEAR,
    PLAIN,
    POSITIVE,
    law,
    make_call,
    random_mask,
    refusal,
)

UNPACKED = [x for x in CONFIGURATIONS if not x.packed]


@pytest.mark.parametrize("scale", [None, 0.0, 0.05, 2.0])
@pytest.mark.parametrize("masked", [False, True])
@law(configurations=UNPACKED)
def test_rows_sum_to_one_and_give_the_outputs(case, configuration, mode, masked, scale):
    call = make_call(case, 70, mode, configuration, heads=4, key_heads=2, seed=1, scale=scale)
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
    assert ((weights - expected).abs() <= 3e-6 * size).all()
    who = {n: x for n, x in call.options.items() if n in ("is_causal", "key_mask")}
    seen = oracle.visible(70, call.key.shape[2], **who)
    assert (weights[~seen.expand_as(weights)] == 0).all()
    sums = weights.double().sum(-1)
    has_keys = seen.any(-1).expand_as(sums)
    assert ((sums - 1).abs() <= 1e-5 * size[..., 0])[has_keys].all()
    assert (sums[~has_keys] == 0).all()
    value = call.value.repeat_interleave(2, dim=1)
    for backend in [name for name in LINEAR if refusal(name, case) is None]:
        out = call.run(backend)
        bound = 6e-5 * conditioning * (1 + out.abs().amax(-1, keepdim=True))
        assert ((weights @ value - out).abs() <= bound).all()


@pytest.mark.parametrize("configuration", [PLAIN, BOTH], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_follows_the_query(dtype, configuration):
    call = make_call(POSITIVE, 20, configuration=configuration, dtype=dtype)
    weights = favor_attention_weights(call.query, call.key, call.feature_map, **call.options)
    assert weights.dtype == dtype


def test_empty():
    call = make_call(POSITIVE, 4, "cross", size=0)
    weights = favor_attention_weights(call.query, call.key, call.feature_map, sinks=2)
    assert weights.shape == (2, 2, 4, 0)


@pytest.mark.parametrize("configuration", UNPACKED, ids=str)
def test_gradients_reach_queries_and_keys(configuration):
    call = make_call(POSITIVE, 90, "causal", configuration, dtype=torch.float64).leaves()
    value = call.value.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    weights = favor_attention_weights(call.query, call.key, call.feature_map, **call.options)
    direct = call.run("torch")
    weight = torch.randn_like(direct)
    for a, b in zip(
        torch.autograd.grad(weights @ value, call.inputs[:2], weight),
        torch.autograd.grad(direct, call.inputs[:2], weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
