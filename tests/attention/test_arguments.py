"""Every refused argument is named, with what was expected and what came."""

import re

import pytest
import torch

from performers import (
    GeneralizedFeatures,
    SoftmaxFeatures,
    favor_attention,
    favor_attention_weights,
)
from tests.attention.cases import FEW, POSITIVE, make_call

OFFSETS = torch.tensor([0, 3, 6])
META = torch.zeros(1, 2, 6, 8, device="meta")


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def attend(query=(1, 4, 6, 8), key=(1, 2, 6, 8), value=(1, 2, 6, 5), features=None, **options):
    tensors = [x if isinstance(x, torch.Tensor) else zeros(*x) for x in (query, key, value)]
    return favor_attention(*tensors, features or SoftmaxFeatures(8), **options)


def test_the_call_that_the_others_break():
    assert attend(is_causal=True).shape == (1, 4, 6, 5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"query": (4, 6, 8)}, r"query must have 4 dimensions.*\(4, 6, 8\)"),
        ({"key": (2, 6, 8)}, r"key must have 4 dimensions.*\(2, 6, 8\)"),
        ({"value": (2, 6, 5)}, r"value must have 4 dimensions.*\(2, 6, 5\)"),
        ({"query": zeros(1, 4, 6, 8, dtype=torch.int64)}, r"query .*floating.*int64"),
        ({"key": zeros(1, 2, 6, 8, dtype=torch.bool)}, r"key .*floating.*bool"),
        ({"value": zeros(1, 2, 6, 5, dtype=torch.int32)}, r"value .*floating.*int32"),
        ({"key": (2, 2, 6, 8)}, r"key must have shape \(1, Hkv, S, 8\).*\(2, 2, 6, 8\)"),
        ({"key": (1, 2, 6, 7)}, r"key must have shape .*\(1, 2, 6, 7\)"),
        ({"value": (1, 2, 5, 5)}, r"value must have shape \(1, 2, 6, Dv\).*\(1, 2, 5, 5\)"),
        ({"value": (1, 1, 6, 5)}, r"value must have shape .*\(1, 1, 6, 5\)"),
        ({"key": (1, 3, 6, 8), "value": (1, 3, 6, 5)}, r"query heads \(4\).*key heads \(3\)"),
        ({"key": (1, 0, 6, 8), "value": (1, 0, 6, 5)}, r"query heads \(4\).*key heads \(0\)"),
        ({"key": zeros(1, 2, 6, 8, dtype=torch.float64)}, r"query, key and value .*float64"),
        ({"features": torch.nn.Linear(8, 8)}, r"feature_map must be .*Linear"),
        ({"features": SoftmaxFeatures(16)}, r"feature_map has head_dim=16.*head_dim=8"),
        ({"features": SoftmaxFeatures(8, num_heads=3)}, r"feature_map has num_heads=3.*4.*2"),
        ({"features": SoftmaxFeatures(8).to("meta")}, r"feature_map is on meta.*cpu.*\.to"),
        ({"scale": -0.5}, r"scale must be .*-0.5"),
        ({"scale": float("nan")}, r"scale must be .*nan"),
        ({"key_mask": zeros(1, 6)}, r"key_mask must be a bool tensor of shape \(1, 6\).*float32"),
        ({"key_mask": torch.ones(1, 5, dtype=torch.bool)}, r"key_mask .*\(1, 6\).*\(1, 5\)"),
        ({"key_mask": torch.ones(1, 1, 6, dtype=torch.bool)}, r"key_mask .*\(1, 1, 6\)"),
        ({"backend": "cuda"}, r"backend must be one of .*'cuda'"),
        (
            {"is_causal": True, "key": (1, 2, 7, 8), "value": (1, 2, 7, 5)},
            r"is_causal needs as many keys as queries, got 7 and 6.*state",
        ),
        ({"return_state": True}, r"return_state need is_causal=True"),
        ({"key": META}, r"key is on meta but query is on cpu"),
        ({"value": META[..., :5]}, r"value is on meta but query is on cpu"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens must rise from 0 to .*6.*\[0, 3\]"),
        ({"cu_seqlens": torch.tensor([1, 6])}, r"cu_seqlens must rise .*\[1, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, r"cu_seqlens must rise .*\[0, 4, 3, 6\]"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, r"cu_seqlens must rise"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, r"cu_seqlens must be .*int32.*float32"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, r"cu_seqlens must be .*\(1, 2\)"),
        (
            {
                "cu_seqlens": OFFSETS,
                "query": (2, 4, 6, 8),
                "key": (2, 2, 6, 8),
                "value": (2, 2, 6, 5),
            },
            r"cu_seqlens needs batch size 1.*got batch size 2",
        ),
        (
            {"cu_seqlens": OFFSETS, "key": (1, 2, 7, 8), "value": (1, 2, 7, 5)},
            r"cu_seqlens needs .*as many keys as queries.*7 keys",
        ),
        (
            {"cu_seqlens": OFFSETS, "is_causal": True, "return_state": True},
            r"return_state cannot be combined with cu_seqlens",
        ),
    ],
)
def test_refused(options, match):
    with pytest.raises(ValueError, match=match):
        attend(**options)


def test_long_offsets_are_shortened_in_the_message():
    with pytest.raises(ValueError, match="cu_seqlens") as caught:
        attend(cu_seqlens=torch.arange(1000))
    assert len(str(caught.value)) < 200


def test_states_need_a_causal_unpacked_call():
    _, state = make_call(POSITIVE, 6, "causal").run(return_state=True)
    with pytest.raises(ValueError, match=r"state .*is_causal=True"):
        attend(state=state)
    with pytest.raises(ValueError, match=r"state cannot be combined with cu_seqlens"):
        attend(is_causal=True, state=state, cu_seqlens=OFFSETS)


@pytest.mark.parametrize(
    ("made", "used", "match"),
    [
        ({"window": 6}, {"window": 7}, "window"),
        ({"window": 6}, {}, "window"),
        ({}, {"window": 6}, "window"),
        ({"sinks": 2}, {"sinks": 3}, "sinks"),
        ({"window": 6, "sinks": 2}, {"window": 6}, "sinks"),
    ],
    ids=str,
)
def test_a_state_of_other_exact_terms_is_refused(made, used, match):
    call = make_call(POSITIVE, 10, "causal")
    _, state = call.run(return_state=True, **made)
    with pytest.raises(ValueError, match=match):
        call.run(state=state, **used)


@pytest.mark.parametrize("change", ["batch", "heads", "head_dim", "value_dim", "num_features"])
def test_a_state_of_other_shapes_is_refused(change):
    sizes = {"batch": 2, "heads": 2, "head_dim": 16, "value_dim": 8, "num_features": 48}
    _, state = make_call(POSITIVE, 40, "causal", FEW, **sizes).run(return_state=True)
    sizes[change] += 1
    other = make_call(POSITIVE, 10, "causal", FEW, **sizes)
    shape = tuple(sizes[name] for name in ("batch", "heads", "num_features", "value_dim"))
    match = "recent_key" if change == "head_dim" else rf"key_value of shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=f"state must have {match}"):
        other.run(state=state)


@pytest.mark.parametrize("field", ["key_value", "key_sum", "log_scale"])
def test_sums_that_do_not_fit_are_refused(field):
    call = make_call(POSITIVE, 40, "causal")
    _, state = call.run(return_state=True)
    setattr(state, field, getattr(state, field)[..., :1])
    with pytest.raises(ValueError, match=f"state must have {field}"):
        call.run(state=state)


def test_a_state_on_another_device_is_refused():
    call = make_call(POSITIVE, 40, "causal")
    _, state = call.run(return_state=True)
    with pytest.raises(ValueError, match=r"state is on meta.*cpu.*\.to"):
        call.run(state=state.to("meta"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": -1}, r"window must be .*-1"),
        ({"window": 1.5}, r"window must be .*1\.5"),
        ({"window": "4"}, r"window must be .*4"),
        ({"window": torch.tensor([1, 2])}, r"window must be"),
        ({"sinks": -1}, r"sinks must be .*-1"),
        ({"sinks": 1.5}, r"sinks must be .*1\.5"),
        ({"sinks": None}, r"sinks must be .*None"),
        ({"window": 0, "size": 5}, r"window needs as many keys as queries.*5"),
        ({"window": 4, "size": 7}, r"window needs as many keys as queries.*7"),
        # The exact weight is that of softmax, which other kernels do not estimate.
        ({"features": GeneralizedFeatures(8), "window": 0}, r"window .*SoftmaxF"),
        ({"features": GeneralizedFeatures(8, fn="exp"), "sinks": 1}, r"sinks .*SoftmaxF"),
        ({"query": (4, 6, 8)}, r"query must have 4 dimensions"),
        ({"key": (1, 2, 6, 9)}, r"key must have shape"),
        ({"size": 7, "is_causal": True}, r"is_causal needs"),
        ({"size": 7, "key_mask": torch.ones(1, 6).bool()}, r"key_mask must be"),
        ({"size": 7, "scale": -1.0}, r"scale must be"),
    ],
    ids=str,
)
def test_refused_by_the_matrix_too(options, match):
    options = dict(options)
    size = options.pop("size", 6)
    query, key = options.pop("query", (1, 4, 6, 8)), options.pop("key", (1, 2, size, 8))
    features = options.pop("features", SoftmaxFeatures(8))
    with pytest.raises(ValueError, match=match):
        attend(query, key, (1, 2, size, 5), features, **options)
    with pytest.raises(ValueError, match=match):
        favor_attention_weights(zeros(*query), zeros(*key), features, **options)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="causal"):
        attend(causal=True)
    x = zeros(1, 1, 2, 8)
    with pytest.raises(TypeError):
        favor_attention(x, x, x, SoftmaxFeatures(8), True)
    for name in ("causal", "cu_seqlens", "state", "return_state", "backend"):
        with pytest.raises(TypeError, match=f"weights takes no {name}: .*options is_causal"):
            favor_attention_weights(x, x, SoftmaxFeatures(8), **{name: None})
