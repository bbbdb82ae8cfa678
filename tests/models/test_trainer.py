"""Every head through transformers' Trainer: evaluation, metrics, the best model, early stopping."""

import pytest
import torch
import transformers
from torch.nn import functional as F

from performers.models import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
)
from tests.models.cases import VOCABULARY, make_config, right_padded, tokens


def targets(head: type, row: torch.Tensor) -> dict[str, object]:
    if head is PerformerForQuestionAnswering:
        return {"start_positions": 2, "end_positions": 4}
    if head is PerformerForSequenceClassification:
        return {"labels": int(row.sum()) % 2}
    if head is PerformerForTokenClassification:
        return {"labels": (row % 2).tolist()}
    return {"labels": row.tolist()}


HEADS = (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
)


@pytest.mark.parametrize("head", HEADS)
def test_training_with_evaluation_and_the_best_model(head, tmp_path):
    torch.manual_seed(0)
    model = head(make_config(is_decoder=head is PerformerForCausalLM))
    data = [{"input_ids": row, **targets(head, row)} for row in tokens(12, 9)]
    seen = []

    def metrics(prediction):
        scores = prediction.predictions
        seen.append([scores] if not isinstance(scores, tuple) else list(scores))
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
        want = model(torch.stack([row["input_ids"] for row in data[:3]]))
    names = ["start_logits", "end_logits"] if "start_logits" in want else ["logits"]
    for got, name in zip([scores] if len(names) == 1 else scores, names, strict=True):
        torch.testing.assert_close(torch.as_tensor(got), want[name], rtol=1e-4, atol=1e-5)


def test_token_classification_has_the_loss_of_its_labels():
    torch.manual_seed(0)
    model = PerformerForTokenClassification(make_config(num_labels=3)).eval()
    ids, mask = right_padded([tokens(1, 9)[0], tokens(1, 5)[0]])
    labels = (ids % 3).masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    assert output.logits.shape == (2, 9, 3)
    want = F.cross_entropy(output.logits[mask != 0], labels[mask != 0])
    torch.testing.assert_close(output.loss, want)
    alone = model(ids[1:, :5]).logits
    torch.testing.assert_close(output.logits[1:, :5], alone, rtol=1e-4, atol=1e-5)


def test_question_answering_has_the_loss_of_both_ends():
    torch.manual_seed(0)
    model = PerformerForQuestionAnswering(make_config()).eval()
    start, end = torch.tensor([1, 30]), torch.tensor([4, 2])
    output = model(tokens(2, 9), start_positions=start, end_positions=end)
    assert output.start_logits.shape == output.end_logits.shape == (2, 9)
    # A position beyond the row has no loss.
    first = F.cross_entropy(output.start_logits[:1], start[:1])
    torch.testing.assert_close(output.loss, (first + F.cross_entropy(output.end_logits, end)) / 2)
    with pytest.raises(ValueError, match="pass both start_positions and end_positions"):
        model(tokens(2, 9), start_positions=start)


@pytest.mark.parametrize(
    ("auto", "head"),
    [
        (transformers.AutoModelForTokenClassification, PerformerForTokenClassification),
        (transformers.AutoModelForQuestionAnswering, PerformerForQuestionAnswering),
    ],
)
def test_auto_classes_open_the_head(auto, head, tmp_path):
    torch.manual_seed(0)
    model = head(make_config(num_labels=VOCABULARY % 7)).eval()
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is head
    for (name, a), (_, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
