"""What a replaced attention does to tiny models: nothing, where it is the exact one."""

import pytest
import torch
import transformers

from performers.benchmark.propagation import propagate
from performers.benchmark.replacement import exact_attention, replace_attention
from performers.convert.distillation.pretrained import load_model
from tests.benchmark.tiny_models import (
    forward,
    llama_config,
    save,
    save_bert,
    token_ids,
)


@pytest.fixture
def bert(tmp_path):
    return load_model(save_bert(tmp_path), head=True)


@pytest.fixture
def llama(tmp_path):
    folder = save(transformers.LlamaForCausalLM, llama_config(), tmp_path / "llama")
    return load_model(folder, head=True)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_exact_attention_changes_nothing(family, implementation, padding, request):
    loaded = request.getfixturevalue(family)
    loaded.model.set_attn_implementation(implementation)
    ids, mask = token_ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    if padding != "none":
        mask[0, slice(6, None) if padding == "right" else slice(None, 3)] = 0
    expected = forward(loaded, ids, mask).logits
    with replace_attention(loaded.model, exact_attention):
        replaced = forward(loaded, ids, mask).logits
    valid = mask.bool()
    assert torch.isfinite(replaced).all()
    torch.testing.assert_close(replaced[valid], expected[valid], atol=1e-4, rtol=1e-4)
    assert loaded.model.config._attn_implementation == implementation
    assert torch.equal(forward(loaded, ids, mask).logits, expected)


def test_the_replacement_is_called_once_a_layer_with_the_models_tensors(llama):
    seen = []

    def attention(layer, query, key, value, *, scale, is_causal, key_mask):
        seen.append((layer, tuple(query.shape), tuple(key.shape), scale, is_causal, key_mask))
        return exact_attention(
            layer, query, key, value, scale=scale, is_causal=is_causal, key_mask=key_mask
        )

    with replace_attention(llama.model, attention) as model:
        assert model is llama.model
        forward(llama, token_ids(1, 6))
    assert seen == [(i, (1, 4, 6, 8), (1, 2, 6, 8), 8**-0.5, True, None) for i in range(3)]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_one_position_keeps_the_models_causality(family, request):
    loaded = request.getfixturevalue(family)
    seen = []

    def attention(layer, query, key, value, **rest):
        seen.append(rest["is_causal"])
        return exact_attention(layer, query, key, value, **rest)

    with replace_attention(loaded.model, attention):
        forward(loaded, token_ids(1, 1))
    assert seen == [family == "llama"] * 3


def test_a_query_that_sees_nothing_gets_zeros():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    key_mask = torch.tensor([[False, False, True, True, True]])
    output = exact_attention(0, query, key, value, scale=0.5, is_causal=True, key_mask=key_mask)
    assert output[:, :, :2].abs().max() == 0
    torch.testing.assert_close(output[:, :, 2], value[:, :, 2])


def test_replacements_nest_and_models_do_not_mix(bert, llama):
    names = []

    def named(name):
        def attention(layer, query, key, value, **rest):
            names.append(name)
            return exact_attention(layer, query, key, value, **rest)

        return attention

    ids = token_ids(1, 4)
    with replace_attention(bert.model, named("outer")):
        with replace_attention(llama.model, named("other")):
            with replace_attention(bert.model, named("inner")):
                forward(bert, ids)
            forward(llama, ids)
        forward(bert, ids)
        forward(llama, ids)
    forward(bert, ids)
    assert names == ["inner"] * 3 + ["other"] * 3 + ["outer"] * 3


def test_errors_leave_the_model_as_it_was(bert):
    ids = token_ids(1, 6)
    expected = forward(bert, ids).logits

    def broken(layer, *tensors, **rest):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replace_attention(bert.model, broken):
        forward(bert, ids)
    with pytest.raises(ZeroDivisionError):
        propagate(bert, ids, broken)
    assert bert.model.config._attn_implementation == "sdpa"
    assert torch.equal(forward(bert, ids).logits, expected)


def test_a_wrong_shape_is_refused(llama):
    with pytest.raises(ValueError, match=r"\(B, H, L, Dv\) = \(1, 4, 6, 8\) for LlamaAttention"):
        propagate(llama, token_ids(1, 6), lambda layer, query, key, value, **rest: value)


def test_models_that_cannot_be_replaced_are_refused(llama):
    linear = replace_attention(torch.nn.Linear(2, 2), exact_attention)
    with pytest.raises(TypeError, match="must be a transformers model, got Linear"), linear:
        pass
    config = transformers.XLNetConfig(vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=8)
    xlnet = replace_attention(transformers.XLNetModel(config), exact_attention)
    with pytest.raises(ValueError, match="XLNetModel does not go through the"), xlnet:
        pass
    with replace_attention(llama.model, exact_attention):
        cache = llama.model(token_ids(1, 4), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"1 queries and 5 keys.*use_cache=False"):
            llama.model(token_ids(1, 1), past_key_values=cache)


def test_capped_scores_are_refused():
    config = transformers.Gemma2Config(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        query_pre_attn_scalar=8,
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    with (
        replace_attention(model, exact_attention),
        pytest.raises(ValueError, match="Gemma2Attention asks for soft-capping"),
    ):
        model(token_ids(1, 4), use_cache=False)
