"""Distillation: what is trained, what is kept, what resumes, and from which checkpoints."""

import copy
import json
import shutil
import signal

import pytest
import torch

from performers.convert import distill, load_performer, to_performer
from performers.features import LearnedFeatures
from tests.convert.models import build, favors, inputs, output, seeded, token_ids

LENGTH = 48


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def teacher_of(kind="llama"):
    model = build(kind)
    with torch.no_grad():
        # Attention that features can learn in a few steps.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "att" in name:
                parameter.mul_(0.6)
    if kind == "bert":
        model.config.mask_token_id = 4
    return model


def examples(count=24, length=LENGTH):
    rows = enumerate(token_ids(count, length, 2))
    return [{"input_ids": row[: length - i % 5]} for i, row in rows]


def student_of(teacher, **options):
    calibration = [torch.stack([x["input_ids"][:40] for x in examples(8)])]
    options = {"num_features": 16, "window": 3, "estimator": "data_aware"} | options
    calibration = calibration if options["estimator"] == "data_aware" else None
    model = copy.deepcopy(teacher)
    return to_performer(model, calibration=calibration, generator=seeded(3), **options)


def hidden_error(student, teacher):
    ids = token_ids(6, LENGTH, seed=5)
    with torch.no_grad():
        ours, theirs = (
            x(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            for x in (student, teacher)
        )
    return float((ours - theirs).square().sum() / theirs.square().sum())


def recorded(model):
    """The arguments of a model's calls in training."""
    calls = []

    def record(module, args, kwargs):
        if module.training:
            calls.append(kwargs)

    model.register_forward_pre_hook(record, with_kwargs=True)
    return calls


@pytest.mark.parametrize("kind", ["llama", pytest.param("electra", marks=pytest.mark.exhaustive)])
def test_transfer_lowers_the_error_and_trains_features_alone(kind, tmp_path):
    teacher = teacher_of(kind)
    student = student_of(teacher)
    before = hidden_error(student, teacher)
    result = distill(student, None, examples(), transfer_steps=40, steps=0, log_steps=5)
    losses = [entry["loss"] for entry in result.history]
    assert losses[-1] < 0.9 * losses[0]
    assert hidden_error(student, teacher) < before
    original = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if ".favor." not in name:
            assert torch.equal(tensor, original[name]), name
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.config.performers["learned"]
    assert not student.training
    student.save_pretrained(tmp_path)
    loaded = load_performer(tmp_path)
    given = {"input_ids": token_ids(2, 20)}
    assert torch.equal(output(loaded, given), output(student, given))
    assert all(isinstance(x.feature_map, LearnedFeatures) for x in favors(loaded))


def test_transfer_begins_at_the_calibrated_features():
    student, given = student_of(teacher_of()), {"input_ids": examples(1)[0]["input_ids"][None]}
    before = output(student, given)
    distill(student, None, examples(), transfer_steps=1, transfer_learning_rate=0.0, steps=0)
    torch.testing.assert_close(output(student, given), before, atol=1e-5, rtol=1e-5)
    assert all(isinstance(x.feature_map, LearnedFeatures) for x in favors(student))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "loss"), [("llama", "logits"), ("electra", "hidden"), ("electra", "embedding")]
)
def test_the_whole_model_comes_closer_to_its_original(kind, loss):
    # Electra at its sharpest: otherwise there is little to gain.
    teacher, seen = teacher_of(kind) if kind == "llama" else build(kind), []
    student = student_of(teacher)
    before = hidden_error(student, teacher)

    def evaluate(model):
        seen.append(model.training)
        return {"error": hidden_error(model, teacher)}

    options = {"transfer_steps": 0, "steps": 40, "learning_rate": 2e-3, "loss": loss}
    options |= {"eval_steps": 20, "evaluate": evaluate, "log_steps": 20}
    result = distill(student, teacher, examples(), **options)
    assert len([entry for entry in result.history if "error" in entry]) == 2
    assert seen == [False, False]
    assert hidden_error(student, teacher) < 0.8 * before
    assert result.finished
    assert result.tokens > 40 * 4 * (LENGTH - 5)


@pytest.mark.parametrize("loss", ["logits", "hidden", "embedding"])
def test_a_copy_has_nothing_to_learn_from_its_original(loss):
    student = student_of(teacher_of(), estimator="positive")
    options = {"transfer_steps": 0, "steps": 1, "loss": loss, "log_steps": 1}

    def evaluate(model):
        return {"in training": float(model.training)}

    result = distill(student, copy.deepcopy(student), examples(4), evaluate=evaluate, **options)
    merged = {key: x for entry in result.history for key, x in entry.items()}
    assert merged["loss"] == pytest.approx(0, abs=1e-5)
    assert merged["in training"] == 0


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_task_needs_no_teacher(kind):
    student = student_of(teacher_of(kind), estimator="positive")
    calls = recorded(student)
    options = {"steps": 12, "loss": "task", "learning_rate": 3e-3, "log_steps": 3}
    result = distill(student, None, examples(), transfer_steps=0, **options)
    assert len(calls) == 12
    for call in calls:
        ids, mask, labels = call["input_ids"], call["attention_mask"], call["labels"]
        assert (ids[mask == 0] == 0).all()
        predicted = labels != -100
        if kind == "llama":
            assert torch.equal(labels[predicted], ids[mask == 1])
        else:
            # Masked models learn from hidden tokens.
            assert 0.02 < predicted.float().mean() < 0.4
            assert (ids[predicted] == 4).all()
            assert (labels[predicted] >= 5).all()
            assert not (predicted & (mask == 0)).any()
    if kind == "llama":
        assert result.history[-1]["loss"] < result.history[0]["loss"]


# peft asks transformers under a deprecated name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_merged_into_the_same_object():
    pytest.importorskip("peft")
    teacher = teacher_of()
    student = student_of(teacher)
    names, before = set(student.state_dict()), hidden_error(student, teacher)
    options = {"transfer_steps": 0, "steps": 15, "lora_rank": 4, "learning_rate": 5e-3}
    assert distill(student, teacher, examples(), **options).finished
    assert set(student.state_dict()) == names
    assert hidden_error(student, teacher) < before
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(student.state_dict()[embeddings], teacher.state_dict()[embeddings])
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_streams_of_images_and_redrawn_features():
    teacher, student = build("vit"), to_performer(build("vit"), num_features=16)
    calls, weight = recorded(student), favors(student)[0].feature_map.weight.clone()
    stream = ({"pixel_values": x} for x in inputs("vit", rows=40)["pixel_values"])
    options = {"transfer_steps": 0, "steps": 4, "redraw_steps": 2, "loss": "hidden"}
    assert distill(student, teacher, stream, **options).finished
    assert calls[0]["pixel_values"].shape == (4, 3, 32, 32)
    assert not torch.equal(favors(student)[0].feature_map.weight, weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0, "transfer_steps": 0}, "not both 0"),
        ({"steps": -1}, "at least 0"),
        ({"loss": "l2"}, "loss must be one of"),
        ({"teacher": None}, "teacher is None"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"resume": True}, "resume needs output_dir"),
        ({"teacher": "student"}, "are the same object"),
        ({"student": build("llama")}, "is no converted transformers model"),
    ],
)
def test_arguments_out_of_range(options, message):
    teacher = teacher_of()
    student = options.get("student") or student_of(teacher, estimator="positive")
    target = {"student": student, None: None}.get(options.get("teacher", ""), teacher)
    rest = {name: x for name, x in options.items() if name not in ("student", "teacher")}
    with pytest.raises(ValueError, match=message):
        distill(student, target, examples(), **rest)


# ------------------------------------------------------------------------------------ checkpoints


def run(folder, *, stop=None, **given):
    """A run of which ``stop`` is called once, after step 4 of the model's 7 has been saved."""
    stops = [] if stop is None else [stop]

    def progress(stage, step, steps, entry):
        if stage == "model" and step == 5 and stops:
            stops.pop()()

    student = student_of(teacher_of(), num_features=8)
    # A stop ends the run after step 6, which must not be the last.
    options = {"transfer_steps": 2, "steps": 7, "save_steps": 2, "log_steps": 1, **given}
    result = distill(
        student, teacher_of(), examples(), output_dir=folder, progress=progress, **options
    )
    return student, result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A run that ended without a word after step 4."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    with pytest.raises(ZeroDivisionError):
        run(folder, stop=lambda: 1 // 0)
    return folder


@pytest.fixture
def folder(broken_off, tmp_path):
    return shutil.copytree(broken_off, tmp_path / "run")


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_same_run(found, whole):
    (student, result), (expected, all_of_it) = found, whole
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    steps = [(x["stage"], x["step"]) for x in result.history]
    assert steps == [(x["stage"], x["step"]) for x in all_of_it.history]
    losses = [x["loss"] for x in all_of_it.history]
    assert [x["loss"] for x in result.history] == pytest.approx(losses, rel=1e-4)
    assert result.tokens == all_of_it.tokens
    assert result.finished


def test_a_run_without_an_undamaged_checkpoint_is_refused(folder):
    for path in folder.glob("model/*/scheduler.pt"):
        change(path)
    with pytest.raises(ValueError, match=r"has no usable checkpoint: checkpoint-4 \(sched") as e:
        run(folder, resume=True)
    assert str(e.value).count("scheduler.pt does not match") == 2
    assert "\n" not in str(e.value)


def test_an_interrupted_run_resumes_to_the_same_run(tmp_path, whole):
    handler = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _, stopped = run(tmp_path, stop=lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not stopped.finished
    found = run(tmp_path, resume=True)
    assert_same_run(found, whole)
    written = json.loads((tmp_path / "distillation.json").read_text())
    assert written["history"] == found[1].history
    assert sum(written["stage_tokens"].values()) == written["tokens"]


def test_the_checkpoint_before_stands_in(folder, whole, caplog):
    change(folder / "model" / "checkpoint-4" / "model.safetensors")
    found = run(folder, resume=True)
    [message] = caplog.messages
    assert "cannot use checkpoint-4 (model.safetensors does not match" in message
    assert message.endswith("resuming from checkpoint-2")
    assert_same_run(found, whole)
