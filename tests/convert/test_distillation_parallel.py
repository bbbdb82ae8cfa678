"""Distillation in several processes against one: rows cut over them, weights sharded."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from performers.convert import distill
from performers.convert.distillation.trainers import Row, divergence, mean_state
from tests.convert.models import build
from tests.convert.test_distillation import examples, student_of, teacher_of
from tests.proteins.runs import finish, launcher, start

_ROOT = Path(__file__).parents[2]
OPTIONS = {"steps": 5, "log_steps": 1, "save_steps": 2, "learning_rate": 1e-3}


def begin(kind, folder, processes, options):
    program = ["-m", "tests.convert.distilled", kind, folder, json.dumps(options)]
    folder.mkdir(exist_ok=True)
    paths = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
    return start(*launcher(processes), *program, PYTHONPATH=paths)


def distilled(kind, folder, processes, **options):
    code, _, err = finish(begin(kind, folder, processes, {**OPTIONS, **options}), seconds=900)
    assert code == 0, err
    return folder


def check_same(one, many, bound=1e-5):
    """Losses and weights equal those of one process; weights in all processes."""
    ours, theirs = (json.loads((x / "history.json").read_text()) for x in (one, many))
    assert [(x["stage"], x["step"]) for x in ours] == [(x["stage"], x["step"]) for x in theirs]
    losses = [x["loss"] for x in ours]
    # Divergences of 0.001 are differences of numbers of order 1, and have their rounding.
    assert [x["loss"] for x in theirs] == pytest.approx(losses, rel=bound, abs=0.003 * bound)
    expected = load_file(one / "0.safetensors")
    for file in many.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            error = (tensor - expected[name]).abs().max()
            assert error <= bound * expected[name].abs().max(), (file.name, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "processes", "options"),
    [
        ("llama", 2, {"sequence_parallel": 2, "transfer_steps": 3}),
        ("bert", 2, {"sequence_parallel": 2, "transfer_steps": 2}),
        ("gpt2", 2, {"sequence_parallel": 2, "transfer_steps": 0, "loss": "task"}),
        ("electra", 2, {"sequence_parallel": 2, "transfer_steps": 0, "loss": "embedding"}),
        # Of a model without masks, which processes with rows of their own draw apart.
        ("electra", 2, {"fsdp": True, "transfer_steps": 2, "loss": "hidden", "accumulation": 2}),
        ("llama", 4, {"sequence_parallel": 2, "transfer_steps": 2}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_processes_distil_the_model_of_one(kind, processes, options, tmp_path):
    one = {name: x for name, x in options.items() if name not in ("fsdp", "sequence_parallel")}
    readers = processes // options.get("sequence_parallel", 1)
    one["accumulation"] = readers * options.get("accumulation", 1)
    alone = distilled(kind, tmp_path / "one", 1, **one)
    check_same(alone, distilled(kind, tmp_path / "many", processes, **options))


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_it_resumes_exactly(tmp_path):
    options = {"sequence_parallel": 2, "transfer_steps": 2, "killed": 4}
    process = begin("llama", tmp_path / "run", 2, {**OPTIONS, **options})
    for line in process.stdout:
        if line.strip() == "killed":
            killed = time.monotonic()
    code, _, err = finish(process, seconds=300)
    assert code != 0
    assert time.monotonic() - killed < 60
    assert "lost another one of this run" in err
    del options["killed"]
    whole = distilled("llama", tmp_path / "whole", 2, **options)
    resumed = distilled("llama", tmp_path / "run", 2, resume=True, **options)
    check_same(whole, resumed, bound=0)


def test_losses_of_one_process_are_means():
    states, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    means = torch.stack([states[0, :3].mean(0), states[1].mean(0)])
    torch.testing.assert_close(mean_state(states, mask, Row()).squeeze(1), means)
    own, theirs = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = theirs.softmax(-1), own.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[mask == 1].mean()
    torch.testing.assert_close(divergence(own, theirs, mask, Row()), expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"sequence_parallel": 2}, "sequence_parallel=2 needs .* start the program with"),
        ("llama", {"fsdp": True}, "fsdp=True needs several processes"),
        ("llama", {"sequence_parallel": 0}, "sequence_parallel must be at least 1"),
        ("llama", {"options": {"fsdp": True}}, "fsdp=True"),
        ("llama", {"sequence_parallel": 2, "data": iter(())}, "data must be a list .* pass list"),
        ("roberta", {"sequence_parallel": 2}, "does not follow position_ids"),
        ("electra", {"sequence_parallel": 2, "loss": "task"}, "no logits for each token"),
    ],
)
def test_runs_that_cannot_be_shared(kind, options, message, monkeypatch):
    if "needs" not in message:
        monkeypatch.setenv("WORLD_SIZE", "2")
    teacher = build("roberta") if kind == "roberta" else teacher_of(kind)
    student = student_of(teacher, estimator="positive")
    with pytest.raises(ValueError, match=message):
        distill(student, teacher, **{"data": examples(), **options})
