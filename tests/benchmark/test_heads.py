"""What the attention layers of tiny models receive."""

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from performers.benchmark.heads import capture_heads
from performers.convert.distillation.pretrained import load_model
from tests.benchmark.tiny_models import llama_config, save, save_bert, token_ids


@pytest.fixture
def bert(tmp_path):
    return save_bert(tmp_path)


@pytest.fixture
def llama(tmp_path):
    return save(LlamaForCausalLM, llama_config(), tmp_path / "llama")


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
    """What the model's own attention layers give, before their output projections (B, L, H*Dv)."""
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
    loaded = load_model(request.getfixturevalue(family))
    loaded.model.set_attn_implementation(implementation)
    ids, mask = token_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    if padding != "none":
        mask[1, slice(7, None) if padding == "right" else slice(None, 4)] = 0
    expected = attention_outputs(loaded, ids, mask)
    samples = capture_heads(loaded, ids, mask)
    assert [sample.layer for sample in samples] == [0, 1, 2]
    for sample, own in zip(samples, expected, strict=True):
        assert sample.is_causal == (family == "llama")
        assert (sample.key_mask is None) == (padding == "none")
        valid = mask.bool()
        assert sample.key_mask is None or torch.equal(sample.key_mask, valid)
        assert sample.scale == pytest.approx(8**-0.5)
        torch.testing.assert_close(
            softmax_attention(sample)[valid], own.double()[valid], atol=2e-5, rtol=2e-5
        )
    assert loaded.model.config._attn_implementation == implementation


def test_samples_have_the_models_grouped_heads_and_no_gradients(llama):
    loaded = load_model(llama)
    (sample,) = capture_heads(loaded, token_ids(2, 9), layers=[1])
    assert sample.layer == 1
    assert sample.query.shape == (2, 4, 9, 8)
    assert sample.key.shape == sample.value.shape == (2, 2, 9, 8)
    for tensor in (sample.query, sample.key, sample.value):
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


def test_rotary_positions_are_applied(llama):
    """The same token everywhere: values repeat, rotated queries and keys do not."""
    loaded = load_model(llama)
    (sample,) = capture_heads(loaded, torch.full((1, 6), 7), layers=[0])
    torch.testing.assert_close(sample.value, sample.value[:, :, :1].expand_as(sample.value))
    assert (sample.key[:, :, 1:] - sample.key[:, :, :1]).abs().amax(dim=(0, 1, 3)).min() > 1e-2
    scores = sample.query[:, :2] @ sample.key.mT
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1], atol=1e-4, rtol=1e-4)


def test_the_model_is_itself_again_after_an_error(bert, monkeypatch):
    loaded = load_model(bert)
    ids = token_ids(1, 9)
    with torch.no_grad():
        expected = loaded.model(ids).last_hidden_state
    monkeypatch.setattr(
        loaded.model.encoder.layer[2].output, "forward", lambda *_: (_ for _ in ()).throw(KeyError)
    )
    with pytest.raises(KeyError):
        capture_heads(loaded, ids)
    monkeypatch.undo()
    assert loaded.model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).last_hidden_state, expected)


def test_layers_must_be_the_models(bert):
    loaded = load_model(bert)
    for layers in ([0, 3], [-1], []):
        with pytest.raises(ValueError, match=r"attention layers \[0, 1, 2\], got"):
            capture_heads(loaded, token_ids(1, 5), layers=layers)


def test_inputs_that_do_not_fit_are_refused(bert):
    loaded = load_model(bert)
    ids = token_ids(2, 8)
    with pytest.raises(ValueError, match=r"shape \(batch, length\), got torch.int64"):
        capture_heads(loaded, ids[0])
    with pytest.raises(ValueError, match=r"got torch.float32"):
        capture_heads(loaded, ids.float())
    with pytest.raises(ValueError, match=r"lie in \[0, 24\].*from 5 to 25"):
        capture_heads(loaded, torch.tensor([[5, 25]]))
    with pytest.raises(ValueError, match="at most 40 positions here, got 41"):
        capture_heads(loaded, token_ids(1, 41))
    with pytest.raises(ValueError, match=r"shape of input_ids, \(2, 8\), got \(2, 7\)"):
        capture_heads(loaded, ids, torch.ones(2, 7))
    with pytest.raises(ValueError, match="hides every token of a row"):
        capture_heads(loaded, ids, torch.tensor([[1] * 8, [0] * 8]))


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
