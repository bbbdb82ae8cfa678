"""Damaged checkpoints of distillation: the one before is resumed from, or the run is refused."""

import os
import shutil

import pytest
import torch

from performers.convert.distillation.training import distill
from tests.convert.test_distillation import examples, student_of, teacher_model

OPTIONS = {"transfer_steps": 2, "steps": 5, "save_steps": 2, "log_steps": 1}


def run(folder, *, broken_off=False, **given):
    def progress(stage, step, steps, entry):
        if broken_off and stage == "model" and step == 5:
            raise ZeroDivisionError

    teacher = teacher_model()
    student = student_of(teacher, num_features=8)
    result = distill(
        student, teacher, examples(), output_dir=folder, progress=progress, **OPTIONS, **given
    )
    return student, result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A run that ended without a word after step 4 of the model's 5."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    with pytest.raises(ZeroDivisionError):
        run(folder, broken_off=True)
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
    assert [(x["stage"], x["step"]) for x in result.history] == [
        (x["stage"], x["step"]) for x in all_of_it.history
    ]
    assert [x["loss"] for x in result.history] == pytest.approx(
        [x["loss"] for x in all_of_it.history], rel=1e-4
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("optimizer.pt", os.unlink, "optimizer.pt is missing"),
        ("model.safetensors", change, "model.safetensors does not match its SHA-256"),
    ],
)
def test_the_checkpoint_before_stands_in(folder, whole, name, damage, reason, caplog):
    damage(folder / "model" / "checkpoint-4" / name)
    found = run(folder, resume=True)
    [message] = caplog.messages
    assert message.startswith(f"{folder / 'model'}: cannot use checkpoint-4 ({reason}")
    assert message.endswith("resuming from checkpoint-2")
    assert_same_run(found, whole)


def test_a_run_without_an_undamaged_checkpoint_is_refused(folder):
    for path in folder.glob("model/*/scheduler.pt"):
        change(path)
    with pytest.raises(ValueError, match=r"has no usable checkpoint: checkpoint-4 \(sched") as e:
        run(folder, resume=True)
    assert str(e.value).count("scheduler.pt does not match") == 2
    assert "\n" not in str(e.value)


@pytest.mark.exhaustive
def test_what_the_transfer_learnt_is_checked_and_made_again(folder, whole):
    learnt = folder / "transferred"
    change(learnt / "parameters.safetensors")
    with pytest.raises(ValueError, match=r"parameters\.safetensors does not match .*delete") as e:
        run(folder, resume=True)
    assert f"delete {learnt} to resume the transfer from its last checkpoint" in str(e.value)
    shutil.rmtree(learnt)
    assert_same_run(run(folder, resume=True), whole)
    assert {path.name for path in learnt.iterdir()} == {"parameters.safetensors", "manifest.json"}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
