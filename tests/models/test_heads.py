"""Sequence classification, the fill-mask pipeline, and what heads refuse."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, pipeline

from performers.models import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerModel,
)
from performers.models.heads import mean_pool
from performers.proteins.tokenizer import build_protein_tokenizer
from tests.models.cases import MAIN, make_config, right_padded, tokens


def classifier(**options):
    torch.manual_seed(0)
    return PerformerForSequenceClassification(make_config(**options)).eval()


@pytest.mark.parametrize("attention", MAIN)
def test_single_label(attention):
    model = classifier(attention=attention, num_labels=3)
    labels = torch.tensor([0, 2, 1, 1])
    output = model(tokens(4, 9), labels=labels)
    assert output.logits.shape == (4, 3)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    assert model.config.problem_type == "single_label_classification"


def test_several_labels():
    model = classifier(num_labels=3)
    labels = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    output = model(tokens(2, 9), labels=labels)
    expected = F.binary_cross_entropy_with_logits(output.logits, labels)
    torch.testing.assert_close(output.loss, expected)
    assert model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("size", [1, 2])
def test_regression(size):
    model = classifier(num_labels=size, problem_type="regression")
    labels = torch.tensor([0.5, -1.0]) if size == 1 else torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    output = model(tokens(2, 9), labels=labels)
    assert output.logits.shape == (2, size)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits.squeeze(), labels))


def test_one_label_without_a_problem_type_is_regression():
    model = classifier(num_labels=1)
    model(tokens(2, 9), labels=torch.tensor([0.5, -1.0]))
    assert model.config.problem_type == "regression"


def test_a_classifier_learns_what_is_in_a_sequence():
    """Whether a sequence holds more of one letter than of another, through padding."""
    torch.manual_seed(0)
    model = PerformerForSequenceClassification(make_config(num_labels=2, initializer_range=0.02))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def draw():
        sizes = torch.randint(5, 13, (32,), generator=generator).tolist()
        rows = [torch.randint(5, 7, (size,), generator=generator) for size in sizes]
        labels = torch.tensor([int((row == 5).sum() * 2 > len(row)) for row in rows])
        return *right_padded(rows), labels

    for _ in range(60):
        ids, mask, labels = draw()
        optimizer.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    ids, mask, labels = draw()
    predicted = model.eval()(ids, attention_mask=mask).logits.argmax(-1)
    assert (predicted == labels).float().mean() > 0.9


def test_mean_over_tokens():
    hidden = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    pooled = mean_pool(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0].mean(0))
    torch.testing.assert_close(pooled[1], hidden[1, [0, 2]].mean(0))
    assert (pooled[2] == 0).all()
    torch.testing.assert_close(mean_pool(hidden, None), hidden.mean(1))


@pytest.mark.parametrize("attention", MAIN)
def test_the_fill_mask_pipeline(tmp_path, attention):
    """From a saved folder, alone and in a batch with padding."""
    torch.manual_seed(0)
    PerformerForMaskedLM(make_config(attention)).save_pretrained(tmp_path)
    build_protein_tokenizer(closed=True).save_pretrained(tmp_path)
    fill = pipeline("fill-mask", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
    sequences = ["MKT<mask>YIAKQR", "MA<mask>"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = PerformerForMaskedLM.from_pretrained(tmp_path)
    alone = [fill(sequence, top_k=4) for sequence in sequences]
    together = fill(sequences, top_k=4, batch_size=2)
    for sequence, found, batched in zip(sequences, alone, together, strict=True):
        ids = tokenizer(sequence, return_tensors="pt")["input_ids"]
        place = (ids[0] == tokenizer.mask_token_id).nonzero().item()
        probabilities = model(ids).logits[0, place].softmax(-1)
        best = probabilities.topk(4)
        assert [answer["token"] for answer in found] == best.indices.tolist()
        assert [answer["token"] for answer in batched] == best.indices.tolist()
        for answer, other, score in zip(found, batched, best.values.tolist(), strict=True):
            assert answer["score"] == pytest.approx(score, rel=1e-4)
            assert other["score"] == pytest.approx(score, rel=1e-3)


def test_masked_language_models_are_not_causal():
    with pytest.raises(ValueError, match="is_decoder=False"):
        PerformerForMaskedLM(make_config(is_decoder=True))


def test_causal_language_models_set_themselves_up():
    config = make_config()
    model = PerformerForCausalLM(config)
    assert model.config.is_decoder
    assert model.performer.config.is_decoder
    # The caller's configuration can still make a bidirectional model.
    assert not config.is_decoder
    assert not PerformerForMaskedLM(config).config.is_decoder


@pytest.mark.parametrize(
    "model_class", [PerformerModel, PerformerForMaskedLM, PerformerForCausalLM]
)
def test_embeddings_can_be_replaced(model_class):
    model = model_class(make_config())
    fresh = torch.nn.Embedding(31, 32)
    model.set_input_embeddings(fresh)
    assert model.get_input_embeddings() is fresh
