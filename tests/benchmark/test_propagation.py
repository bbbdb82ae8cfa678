"""Errors of hidden states and losses of tiny models under another attention."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from performers.benchmark.propagation import propagate
from performers.benchmark.replacement import exact_attention, replace_attention
from performers.convert.distillation.pretrained import load_model
from tests.benchmark.tiny_models import (
    VOCABULARY,
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
    return load_model(save_bert(tmp_path), head=True)


@pytest.fixture
def llama(tmp_path):
    folder = save(transformers.LlamaForCausalLM, llama_config(), tmp_path / "llama")
    return load_model(folder, head=True)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_exact_attention_propagates_no_error(family, request):
    loaded = request.getfixturevalue(family)
    result = propagate(loaded, token_ids(2, 12), exact_attention)
    assert [entry.layer for entry in result.layers] == [0, 1, 2]
    assert max(entry.error for entry in result.layers) < 1e-5
    assert result.replaced_loss == pytest.approx(result.loss, rel=1e-5)
    assert result.replaced_perplexity == pytest.approx(math.exp(result.loss), rel=1e-5)


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
    assert [entry.error for entry in result.layers] == pytest.approx(expected, rel=1e-4)
    assert result.final == result.layers[-1].error > 0.01
    cosine = F.cosine_similarity(original[-1], replaced[-1], dim=-1).mean()
    assert result.cosine == pytest.approx(float(cosine), rel=1e-4)
    assert propagate(loaded, ids, exact_attention).cosine == pytest.approx(1, rel=1e-5)


def test_the_causal_loss_is_the_models_own(llama):
    ids = token_ids(2, 12, vocabulary=50)
    result = propagate(llama, ids, identity)
    with torch.no_grad():
        expected = float(llama.model(ids, labels=ids).loss)
        with replace_attention(llama.model, identity):
            replaced = float(llama.model(ids, labels=ids, use_cache=False).loss)
    assert result.predicted == 22
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.replaced_loss == pytest.approx(replaced, rel=1e-5)
    assert abs(replaced - expected) > 1e-3


def test_the_masked_loss_is_that_of_the_hidden_tokens(bert):
    ids = token_ids(2, 12)
    ids[:, 0], ids[:, -1] = 2, 3
    given = ids.clone()
    result = propagate(bert, ids, identity, mask_fraction=1.0)
    assert torch.equal(ids, given)
    hidden = ids.clone()
    hidden[:, 1:-1] = VOCABULARY.index("[MASK]")
    logits = forward(bert, hidden).logits[:, 1:-1]
    expected = float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:-1].flatten()))
    assert result.predicted == 20
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.replaced_loss != pytest.approx(expected, rel=1e-3)


def test_the_choice_of_hidden_tokens_follows_the_seed(bert):
    ids = token_ids(2, 30)
    one, again = (propagate(bert, ids, exact_attention, seed=3) for _ in range(2))
    assert one == again
    assert one.predicted == 2 * round(0.15 * 30)
    assert propagate(bert, ids, exact_attention, seed=4).loss != one.loss


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_does_not_count(family, request):
    loaded = request.getfixturevalue(family)
    ids = token_ids(1, 9)
    padded = torch.cat([ids, torch.full((1, 4), 7)], dim=1)
    mask = torch.tensor([[1] * 9 + [0] * 4])
    plain = propagate(loaded, ids, identity, mask_fraction=1.0)
    result = propagate(loaded, padded, identity, attention_mask=mask, mask_fraction=1.0)
    assert result.predicted == plain.predicted
    assert result.loss == pytest.approx(plain.loss, rel=1e-4)
    assert result.replaced_loss == pytest.approx(plain.replaced_loss, rel=1e-4)
    for one, other in zip(result.layers, plain.layers, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-4)


def test_a_model_without_head_has_errors_and_no_loss(tmp_path):
    loaded = load_model(save(transformers.BertModel, bert_config(), tmp_path / "base"))
    result = propagate(loaded, token_ids(1, 8), identity)
    assert result.final > 0.01
    assert (result.loss, result.replaced_loss, result.predicted) == (None, None, 0)
    assert result.perplexity is None
    assert result.replaced_perplexity is None


def test_what_cannot_be_predicted_is_refused(bert, llama, tmp_path):
    with pytest.raises(ValueError, match="nothing to predict"):
        propagate(llama, token_ids(2, 1), exact_attention)
    with pytest.raises(ValueError, match="nothing to predict"):
        propagate(bert, torch.tensor([[2, 3]]), exact_attention)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"mask_fraction must be in \(0, 1\]"):
            propagate(bert, token_ids(1, 4), exact_attention, mask_fraction=fraction)
    folder = save(transformers.BertForMaskedLM, bert_config(), tmp_path / "bare" / "bert")
    with pytest.raises(ValueError, match="needs a tokenizer with a mask token"):
        propagate(load_model(folder, head=True), token_ids(1, 6), exact_attention)


def test_a_model_that_never_attends_is_refused(tmp_path):
    config = transformers.FNetConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, intermediate_size=8
    )
    loaded = load_model(save(transformers.FNetModel, config, tmp_path / "fnet"))
    with pytest.raises(ValueError, match="FNetModel called none of its attention"):
        propagate(loaded, token_ids(1, 6), exact_attention)
