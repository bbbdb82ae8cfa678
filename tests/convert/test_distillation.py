"""Distillation of tiny models: what is trained, what is kept, and what resumes."""

import copy
import json
import signal

import pytest
import torch
import transformers

from performers.convert import to_performer
from performers.convert.distillation.batches import Collator
from performers.convert.distillation.trainers import relative_error
from performers.convert.distillation.training import default_collator, distill
from performers.convert.options import FAVOR
from performers.convert.saving import load_performer
from performers.features import LearnedFeatures

VOCABULARY, LENGTH = 40, 48


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def teacher_model(kind="llama"):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(1)
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(config)
    else:
        names = {"bert": transformers.BertModel, "bert-mlm": transformers.BertForMaskedLM}
        model = names[kind](transformers.BertConfig(**sizes, mask_token_id=4))
    # Random weights attend evenly; larger ones make heads that features find hard, and that matter.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "att" in name:
                parameter.mul_(12)
    return model.eval()


def examples(count=24, length=LENGTH):
    generator = torch.Generator().manual_seed(2)
    return [
        {"input_ids": torch.randint(5, VOCABULARY, (length - i % 5,), generator=generator)}
        for i in range(count)
    ]


def student_of(teacher, **options):
    calibration = [torch.stack([x["input_ids"][:40] for x in examples(8)])]
    options = {"num_features": 16, "window": 3, "estimator": "data_aware"} | options
    if options["estimator"] != "data_aware":
        calibration = None
    generator = torch.Generator().manual_seed(3)
    return to_performer(
        copy.deepcopy(teacher), calibration=calibration, generator=generator, **options
    )


def hidden_error(student, teacher):
    batch = default_collator(teacher)(examples(6))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = [
            model(**inputs, output_hidden_states=True).hidden_states[-1]
            for model in (student, teacher)
        ]
    return float(relative_error(*states, inputs["attention_mask"]))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_transfer_lowers_the_error_and_trains_features_alone(kind):
    teacher = teacher_model(kind)
    student = student_of(teacher)
    before = hidden_error(student, teacher)
    result = distill(student, None, examples(), transfer_steps=40, steps=0, log_steps=5)
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < 0.9 * losses[0]
    assert hidden_error(student, teacher) < before
    original = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if f".{FAVOR}." not in name:
            assert torch.equal(tensor, original[name]), name
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.config.performers["learned"]
    assert not student.training


def test_transfer_begins_at_the_calibrated_features():
    teacher = teacher_model()
    student = student_of(teacher)
    inputs = examples(1)[0]["input_ids"].unsqueeze(0)

    def logits():
        with torch.no_grad():
            return student(inputs, use_cache=False).logits

    before = logits()
    distill(student, None, examples(), transfer_steps=1, transfer_learning_rate=0.0, steps=0)
    torch.testing.assert_close(logits(), before, atol=1e-5, rtol=1e-5)
    block = student.model.layers[0].self_attn.favor
    assert isinstance(block.feature_map, LearnedFeatures)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "loss"), [("llama", "logits"), ("bert", "hidden"), ("bert", "embedding")]
)
def test_the_whole_model_comes_closer_to_its_original(kind, loss):
    teacher = teacher_model(kind)
    student = student_of(teacher)
    before = hidden_error(student, teacher)
    seen = []
    result = distill(
        student,
        teacher,
        examples(),
        transfer_steps=0,
        steps=40,
        learning_rate=2e-3,
        loss=loss,
        eval_steps=20,
        evaluate=lambda model: {
            "error": seen.append(model.training) or hidden_error(model, teacher)
        },
        log_steps=20,
    )
    errors = [entry["error"] for entry in result.history if "error" in entry]
    assert len(errors) == 2
    assert seen == [False, False]
    assert hidden_error(student, teacher) < 0.8 * before
    assert result.finished
    assert result.tokens > 40 * 4 * (LENGTH - 5)


def test_the_task_needs_no_teacher():
    student = student_of(teacher_model(), estimator="positive")
    result = distill(
        student, None, examples(), transfer_steps=0, steps=12, loss="task", learning_rate=3e-3,
        log_steps=3,
    )  # fmt: skip
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < losses[0]


def test_masked_models_learn_from_hidden_tokens():
    teacher = teacher_model("bert-mlm")
    batch = default_collator(teacher)(examples(8))
    hidden = batch["input_ids"] == 4
    assert 0.05 < hidden.float().mean() < 0.3
    assert (batch["labels"][~hidden] == -100).all()
    assert (batch["labels"][hidden] >= 5).all()
    assert not (hidden & (batch["attention_mask"] == 0)).any()
    student = student_of(teacher)
    before = hidden_error(student, teacher)
    distill(student, teacher, examples(), transfer_steps=0, steps=30, learning_rate=2e-3)
    assert hidden_error(student, teacher) < before


def test_adapters_are_merged_into_the_same_object():
    pytest.importorskip("peft")
    teacher = teacher_model()
    student = student_of(teacher)
    names = set(student.state_dict())
    before = hidden_error(student, teacher)
    result = distill(
        student, teacher, examples(), transfer_steps=0, steps=40, lora_rank=4, learning_rate=5e-3
    )
    assert result.finished
    assert set(student.state_dict()) == names
    assert hidden_error(student, teacher) < before
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(student.state_dict()[embeddings], teacher.state_dict()[embeddings])
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_learned_features_are_saved_and_loaded(tmp_path):
    student = student_of(teacher_model())
    distill(student, None, examples(), transfer_steps=3, steps=0)
    student.save_pretrained(tmp_path)
    loaded = load_performer(tmp_path)
    ids = examples(1)[0]["input_ids"].unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert isinstance(loaded.model.layers[0].self_attn.favor.feature_map, LearnedFeatures)


@pytest.mark.exhaustive
def test_a_stopped_run_resumes_to_the_same_weights(tmp_path):
    teacher = teacher_model()
    whole, parts = student_of(teacher), student_of(teacher)
    options = {"transfer_steps": 6, "steps": 8, "save_steps": 2, "log_steps": 1}
    expected = distill(whole, teacher, examples(), output_dir=tmp_path / "a", **options)

    sent = []

    def stop(stage, step, steps, entry):
        if stage == "model" and step == 5 and not sent:
            sent.append(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopped = distill(
            parts, teacher, examples(), output_dir=tmp_path / "b", progress=stop, **options
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not stopped.finished
    fresh = student_of(teacher)
    resumed = distill(fresh, teacher, examples(), output_dir=tmp_path / "b", resume=True, **options)
    assert resumed.finished
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    losses = [(x["stage"], x["step"], round(x["loss"], 4)) for x in resumed.history]
    assert losses == [(x["stage"], x["step"], round(x["loss"], 4)) for x in expected.history]
    assert resumed.tokens == expected.tokens
    written = json.loads((tmp_path / "b" / "distillation.json").read_text())
    assert written["history"] == resumed.history


def test_redrawn_features_and_streams():
    teacher = teacher_model()
    student = student_of(teacher, estimator="positive")
    weight = student.model.layers[0].self_attn.favor.feature_map.weight.clone()
    stream = (example for example in examples(100))
    distill(student, teacher, stream, transfer_steps=0, steps=4, redraw_steps=2)
    assert not torch.equal(student.model.layers[0].self_attn.favor.feature_map.weight, weight)


def test_batches_are_padded_and_images_stacked():
    collate = Collator(pad_token_id=7)
    batch = collate([{"input_ids": [1, 2, 3]}, {"input_ids": [4], "attention_mask": [1]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    images = collate([{"pixel_values": torch.ones(3, 2, 2)}] * 2)
    assert images["pixel_values"].shape == (2, 3, 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0, "transfer_steps": 0}, "not both 0"),
        ({"steps": -1}, "at least 0"),
        ({"loss": "l2"}, "loss must be one of"),
        ({"teacher": None}, "teacher is None"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"resume": True}, "resume needs output_dir"),
    ],
)
def test_arguments_out_of_range(options, message):
    teacher = teacher_model()
    student = student_of(teacher, estimator="positive")
    target = options.pop("teacher", teacher)
    with pytest.raises(ValueError, match=message):
        distill(student, target, examples(), **options)


def test_models_that_cannot_be_distilled():
    teacher = teacher_model()
    with pytest.raises(ValueError, match="is no converted transformers model"):
        distill(copy.deepcopy(teacher), teacher, examples())
    student = student_of(teacher, estimator="positive")
    with pytest.raises(ValueError, match="are the same object"):
        distill(student, student, examples())
