"""Attention layers of tiny models: captured, replaced, and the errors that come of it."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from performers.convert.distillation.pretrained import load_model
from performers.models.arguments import CACHE_KEYWORD
from performers.planning.samples import Samples
from studies.accuracy.capture import (
    capture_heads,
    exact_attention,
    propagate,
    replace_attention,
)
from tests.benchmark.tiny_models import (
    bert_config,
    forward,
    identity,
    llama_config,
    save,
    save_bert,
    token_ids,
)


@pytest.fixture
def bert(tmp_path):
    return load_model(save_bert(tmp_path))


@pytest.fixture
def llama(tmp_path):
    folder = save(transformers.LlamaForCausalLM, llama_config(), tmp_path / "llama")
    return load_model(folder)


def softmax_attention(sample):
    """The formula, in float64, with a head's keys and values repeated for its group."""
    query, key, value = (x.double() for x in (sample.query, sample.key, sample.value))
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = sample.scale * query @ key.mT
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool)
    if sample.is_causal:
        seen = seen.tril()
    if sample.key_mask is not None:
        seen = seen & sample.key_mask[:, None, None, :]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def attention_outputs(loaded, ids, mask):
    """Outputs of the model's attention layers before their output projections (B, L, H*Dv)."""
    outputs = []
    suffix = "attention.self" if loaded.model.config.model_type == "bert" else "self_attn.o_proj"

    def keep(module, inputs, output):
        outputs.append(output[0] if suffix == "attention.self" else inputs[0])

    handles = [
        module.register_forward_hook(keep)
        for name, module in loaded.model.named_modules()
        if name.endswith(suffix)
    ]
    with torch.no_grad():
        loaded.model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_captured_heads_give_the_models_own_attention(family, implementation, padding, request):
    loaded = request.getfixturevalue(family)
    loaded.model.set_attn_implementation(implementation)
    ids, mask = token_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    if padding != "none":
        mask[1, slice(7, None) if padding == "right" else slice(None, 4)] = 0
    valid = mask.bool()
    expected = attention_outputs(loaded, ids, mask)
    samples = capture_heads(loaded, ids, mask)
    assert [sample.layer for sample in samples] == [0, 1, 2]
    for sample, own in zip(samples, expected, strict=True):
        assert sample.is_causal == (family == "llama")
        assert (sample.key_mask is None) == (padding == "none")
        assert sample.key_mask is None or torch.equal(sample.key_mask, valid)
        assert sample.scale == pytest.approx(8**-0.5)
        torch.testing.assert_close(
            softmax_attention(sample)[valid], own.double()[valid], atol=2e-5, rtol=2e-5
        )
    assert loaded.model.config._attn_implementation == implementation
    logits = forward(loaded, ids, mask).logits
    with replace_attention(loaded.model, exact_attention):
        replaced = forward(loaded, ids, mask).logits
    assert torch.isfinite(replaced).all()
    torch.testing.assert_close(replaced[valid], logits[valid], atol=1e-4, rtol=1e-4)
    assert loaded.model.config._attn_implementation == implementation
    assert torch.equal(forward(loaded, ids, mask).logits, logits)


def test_layers_are_chosen(bert):
    (sample,) = capture_heads(bert, token_ids(2, 9), layers=[1])
    assert sample.layer == 1
    for tensor in (sample.query, sample.key, sample.value):
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


def test_a_sliding_window_is_refused_where_it_hides_something(tmp_path):
    options = llama_config().to_dict() | {"sliding_window": 6}
    for name in ("model_type", "architectures", "dtype"):
        options.pop(name, None)
    config = transformers.MistralConfig(**options)
    loaded = load_model(save(transformers.MistralForCausalLM, config, tmp_path / "mistral"))
    assert len(capture_heads(loaded, token_ids(1, 6))) == 3
    with pytest.raises(ValueError, match="MistralAttention asks for a sliding window"):
        capture_heads(loaded, token_ids(1, 12))
    assert loaded.model.config._attn_implementation == "sdpa"


def test_a_query_that_sees_nothing_gets_zeros():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    key_mask = torch.tensor([[False, False, True, True, True]])
    output = exact_attention(Samples(query, key, value, key_mask, scale=0.5, is_causal=True))
    assert output[:, :, :2].abs().max() == 0
    torch.testing.assert_close(output[:, :, 2], value[:, :, 2])


def test_errors_leave_the_model_as_it_was(bert):
    ids = token_ids(1, 6)
    expected = forward(bert, ids).logits

    def broken(sample):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replace_attention(bert.model, broken):
        forward(bert, ids)
    with pytest.raises(ZeroDivisionError):
        propagate(bert, ids, broken)
    assert bert.model.config._attn_implementation == "sdpa"
    assert torch.equal(forward(bert, ids).logits, expected)


def test_models_that_cannot_be_replaced_are_refused(llama):
    config = transformers.XLNetConfig(vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=8)
    xlnet = replace_attention(transformers.XLNetModel(config), exact_attention)
    with pytest.raises(ValueError, match="XLNetModel does not go through the"), xlnet:
        pass
    with replace_attention(llama.model, exact_attention):
        cache = llama.model(token_ids(1, 4), use_cache=True)[CACHE_KEYWORD]
        with pytest.raises(ValueError, match=r"1 queries and 5 keys.*use_cache=False"):
            llama.model(token_ids(1, 1), **{CACHE_KEYWORD: cache})


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_errors_are_those_of_the_hidden_states(family, request):
    loaded = request.getfixturevalue(family)
    ids = token_ids(3, 12)
    original = forward(loaded, ids).hidden_states[1:]
    with replace_attention(loaded.model, identity):
        replaced = forward(loaded, ids).hidden_states[1:]
    expected = [
        float((new - old).norm() / old.norm()) for old, new in zip(original, replaced, strict=True)
    ]
    result = propagate(loaded, ids, identity)
    assert list(result.errors) == pytest.approx(expected, rel=1e-4)
    assert result.errors[-1] > 0.01
    cosine = F.cosine_similarity(original[-1], replaced[-1], dim=-1).mean()
    assert result.cosine == pytest.approx(float(cosine), rel=1e-4)
    assert propagate(loaded, ids, exact_attention).cosine == pytest.approx(1, rel=1e-5)


def test_the_causal_perplexity_is_that_of_the_models_loss(llama):
    ids = token_ids(2, 12, vocabulary=50)
    result = propagate(llama, ids, identity)
    with torch.no_grad():
        expected = llama.model(ids, labels=ids).loss.exp().item()
        with replace_attention(llama.model, identity):
            replaced = llama.model(ids, labels=ids, use_cache=False).loss.exp().item()
    assert result.original.tokens == 22
    assert result.original.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.replaced.perplexity == pytest.approx(replaced, rel=1e-5)
    assert abs(replaced - expected) > 1e-3


def test_the_same_tokens_are_hidden_from_both_models(bert):
    ids = token_ids(2, 30)
    one, again = (propagate(bert, ids, exact_attention, seed=3) for _ in range(2))
    assert one == again
    assert one.original.tokens == 2 * round(0.15 * 30)
    assert one.replaced.perplexity == pytest.approx(one.original.perplexity, rel=1e-5)
    assert propagate(bert, ids, exact_attention, seed=4).original != one.original


def test_a_model_without_head_has_errors_and_no_perplexity(tmp_path):
    loaded = load_model(save(transformers.BertModel, bert_config(), tmp_path / "base"))
    result = propagate(loaded, token_ids(1, 8), identity)
    assert result.errors[-1] > 0.01
    assert result.original is result.replaced is None


def test_a_model_that_never_attends_is_refused(tmp_path):
    config = transformers.FNetConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, intermediate_size=8
    )
    loaded = load_model(save(transformers.FNetModel, config, tmp_path / "fnet"))
    with pytest.raises(ValueError, match="FNetModel called none of its attention"):
        propagate(loaded, token_ids(1, 6), exact_attention)
