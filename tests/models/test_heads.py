"""Heads: outputs, losses, Auto classes, training with Trainer, the fill-mask pipeline."""

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoTokenizer, pipeline

from performers.models import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
    PerformerModel,
)
from performers.models.arguments import CACHE_KEYWORD
from performers.models.heads import mean_pool
from performers.proteins.inputs.tokenizer import build_protein_tokenizer
from tests.models.cases import (
    HEADS,
    build,
    causal_model,
    make_config,
    masked_model,
    output_names,
    right_padded,
    targets,
    tokens,
)

CLASSIFIER = PerformerForSequenceClassification


@pytest.mark.parametrize("head", HEADS)
def test_dictionaries_and_tuples(head):
    model, ids = build(head), tokens(2, 7)
    options = {"output_attentions": True, "output_hidden_states": True, **targets(head, ids)}
    output = model(ids, **options)
    names = list(output_names(head))
    if head is not PerformerModel:
        names = ["loss", *names]
    if head is PerformerForCausalLM:
        names.append(CACHE_KEYWORD)
    assert list(output.keys()) == [*names, "hidden_states", "attentions"]
    as_tuple = model(ids, **options, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(output.keys())
    for name, value in zip(output.keys(), as_tuple, strict=True):
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, output[name], rtol=0, atol=0)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


@pytest.mark.parametrize("head", [head for head in HEADS if head is not PerformerModel])
def test_training_with_evaluation_and_the_best_model(head, tmp_path):
    torch.manual_seed(0)
    model = head(make_config(is_decoder=head is PerformerForCausalLM))
    ids = tokens(12, 9)
    labels = targets(head, ids)
    data = [
        {"input_ids": row, **{name: values[i] for name, values in labels.items()}}
        for i, row in enumerate(ids)
    ]
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"count": float(len(seen))}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_count",
        greater_is_better=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data[:8],
        compute_metrics=metrics,
        callbacks=[transformers.EarlyStoppingCallback(early_stopping_patience=3)],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert trainer.evaluate()["eval_loss"] > 0
    scores = trainer.predict(data[:3]).predictions
    model.eval()
    with torch.no_grad():
        want = model(ids[:3])
    scores = scores if isinstance(scores, tuple) else (scores,)
    for got, name in zip(scores, output_names(head), strict=True):
        torch.testing.assert_close(torch.as_tensor(got), want[name], rtol=1e-4, atol=1e-5)


def test_masked_loss_is_the_mean_over_labelled_tokens():
    model, ids = masked_model(), tokens(2, 9)
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[1, 5], labels[1, 8] = 7, 8, 9
    output = model(ids, labels=labels)
    chosen = labels != -100
    expected = F.cross_entropy(output.logits[chosen], labels[chosen])
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)


def test_causal_loss_is_that_of_the_next_token():
    model, ids = causal_model(), tokens(2, 9)
    output = model(ids, labels=ids.index_fill(1, torch.tensor([4]), -100))
    keep = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    expected = F.cross_entropy(output.logits[:, keep].flatten(0, 1), ids[:, keep + 1].flatten())
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)
    for kept, places in ((2, [7, 8]), (torch.tensor([0, 4]), [0, 4])):
        logits = model(ids, logits_to_keep=kept).logits
        torch.testing.assert_close(logits, output.logits[:, places])


# Number of labels, problem type asked for, labels, loss, problem type that follows.
REAL, PAIRS = torch.tensor([0.5, -1.0]), torch.tensor([[0.5, 1.0], [2.0, -1.0]])
PROBLEMS = [
    (3, None, torch.tensor([0, 2]), F.cross_entropy, "single_label_classification"),
    (
        3,
        None,
        torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]),
        F.binary_cross_entropy_with_logits,
        "multi_label_classification",
    ),
    (1, "regression", REAL, F.mse_loss, "regression"),
    (2, "regression", PAIRS, F.mse_loss, "regression"),
    (1, None, REAL, F.mse_loss, "regression"),
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_losses_of_classifiers(problem):
    size, asked, labels, loss, found = problem
    model = build(CLASSIFIER, num_labels=size, problem_type=asked)
    output = model(tokens(2, 9), labels=labels)
    assert output.logits.shape == (2, size)
    torch.testing.assert_close(output.loss, loss(output.logits.squeeze(), labels))
    assert model.config.problem_type == found


def test_token_classification_has_the_loss_of_its_labels():
    model = build(PerformerForTokenClassification, "reversible", num_labels=3)
    ids, mask = right_padded([tokens(1, 9)[0], tokens(1, 5)[0]])
    labels = (ids % 3).masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    assert output.logits.shape == (2, 9, 3)
    want = F.cross_entropy(output.logits[mask != 0], labels[mask != 0])
    torch.testing.assert_close(output.loss, want)
    alone = model(ids[1:, :5]).logits
    torch.testing.assert_close(output.logits[1:, :5], alone, rtol=1e-4, atol=1e-5)


def test_question_answering_has_the_loss_of_both_ends():
    model = build(PerformerForQuestionAnswering)
    start, end = torch.tensor([1, 30]), torch.tensor([4, 2])
    output = model(tokens(2, 9), start_positions=start, end_positions=end)
    assert output.start_logits.shape == output.end_logits.shape == (2, 9)
    # A position beyond the row has no loss.
    first = F.cross_entropy(output.start_logits[:1], start[:1])
    torch.testing.assert_close(output.loss, (first + F.cross_entropy(output.end_logits, end)) / 2)


def test_mean_over_tokens():
    hidden = torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    pooled = mean_pool(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0].mean(0))
    torch.testing.assert_close(pooled[1], hidden[1, [0, 2]].mean(0))
    assert (pooled[2] == 0).all()
    torch.testing.assert_close(mean_pool(hidden, None), hidden.mean(1))


def test_the_fill_mask_pipeline(tmp_path):
    """From a saved folder, alone and in a batch with padding."""
    build(PerformerForMaskedLM).save_pretrained(tmp_path)
    build_protein_tokenizer(closed=True).save_pretrained(tmp_path)
    fill = pipeline("fill-mask", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
    sequences = ["MKT<mask>YIAKQR", "MA<mask>"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = PerformerForMaskedLM.from_pretrained(tmp_path)
    together = fill(sequences, top_k=4, batch_size=2)
    for sequence, batched in zip(sequences, together, strict=True):
        ids = tokenizer(sequence, return_tensors="pt")["input_ids"]
        place = (ids[0] == tokenizer.mask_token_id).nonzero().item()
        best = model(ids).logits[0, place].softmax(-1).topk(4)
        for answers, tolerance in ((fill(sequence, top_k=4), 1e-4), (batched, 1e-3)):
            assert [answer["token"] for answer in answers] == best.indices.tolist()
            scores = [answer["score"] for answer in answers]
            assert scores == pytest.approx(best.values.tolist(), rel=tolerance)


def test_causality_of_language_models():
    with pytest.raises(ValueError, match="is_decoder=False"):
        PerformerForMaskedLM(make_config(is_decoder=True))
    config = make_config()
    model = PerformerForCausalLM(config)
    assert model.config.is_decoder
    assert model.performer.config.is_decoder
    # The caller's configuration can still make a bidirectional model.
    assert not config.is_decoder
    assert not PerformerForMaskedLM(config).config.is_decoder
