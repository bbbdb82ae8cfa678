"""Training over processes: the parts here, runs of several processes under the marker slow."""

import json
import re
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import transformers

from performers.app.errors import UserError
from performers.distributed.batches import one_row, with_least_length
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.training.arguments import training_arguments
from performers.training.parallel import ParallelTrainer, lost_processes, mesh_arguments
from tests.proteins.runs import (
    finish,
    flags,
    history,
    launcher,
    losses,
    proteins,
    small_options,
    start,
    weights,
    write_sequences,
)


@pytest.mark.parametrize(("processes", "share"), [(2, 2), (4, 2), (4, 1)])
def test_processes_on_the_mesh(processes, share):
    mesh = mesh_arguments(processes, sequence_parallel=share)["parallelism_config"]
    assert (mesh.dp_shard_size, mesh.cp_size) == (processes // share, share)
    # Reversible blocks call their branches, and hooks of a block would not run.
    policy = mesh_arguments(processes, blocks=())["fsdp_config"]["auto_wrap_policy"]
    assert policy == "NO_WRAP"


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        ({"sequence_parallel": 2}, 1, "--sequence-parallel 2 needs .* a multiple of 2, .* has 1; "),
        ({"sequence_parallel": 4}, 6, r"a multiple of 4, .* has 6; .* --nproc-per-node 4 -m perf"),
        ({"fsdp": True}, 1, "--fsdp needs several processes, and this run has 1"),
    ],
)
def test_a_number_of_processes_that_does_not_fit(
    options, processes, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=message):
        training_arguments(tmp_path, small_options(device="cpu", **options))


def test_rows_of_packed_sequences_as_one():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]]),
        "labels": torch.tensor([[5, 6, -100, 8], [9, 10, 11, -100]]),
        # The last id of the first row is the first of the second.
        "sequence_ids": torch.tensor([[0, 0, 1, 1], [1, 1, 1, -1]]),
    }
    whole, boundaries = one_row(batch, is_causal=True)
    assert boundaries == [0, 2, 4, 7, 8]
    assert whole["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 0]]
    # The first token of a row follows from none, and is hidden like any other.
    assert whole["labels"].tolist() == [[-100, 6, -100, 8, -100, 10, 11, -100]]
    masked = one_row(batch, is_causal=False)[0]["labels"]
    assert masked.tolist() == [[5, 6, -100, 8, 9, 10, 11, -100]]


def test_short_rows_are_padded():
    ids = torch.tensor([[5, 6]])
    assert with_least_length({"input_ids": ids}, 2, pad=1).keys() == {"input_ids"}
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids}
    padded = with_least_length(batch, 4, pad=1)
    assert {name: x.tolist() for name, x in padded.items()} == {
        "input_ids": [[5, 6, 1, 1]],
        "labels": [[5, 6, -100, -100]],
        "position_ids": [[5, 6, 0, 0]],
        "attention_mask": [[1, 1, 0, 0]],
    }
    with pytest.raises(ValueError, match="rows of 2 tokens are too short to be cut, and weights"):
        with_least_length({"input_ids": ids, "weights": ids}, 4, pad=1)


@pytest.mark.parametrize("process", [0, 1])
def test_each_process_draws_its_own_dropout(process, monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "train", lambda trainer: torch.initial_seed())
    trainer = ParallelTrainer.__new__(ParallelTrainer)
    trainer.args = SimpleNamespace(fsdp=None, seed=5, world_size=2, process_index=process)
    torch.manual_seed(5)
    assert trainer.train() == 5 + process


def test_a_lost_process_is_one_line(monkeypatch):
    ignored = []
    monkeypatch.setattr(signal, "signal", lambda *given: ignored.append(given))
    gone = "[/x/gloo/transport/tcp/pair.cc:537] Connection closed by peer [::1]:1. Check the logs."
    with (
        pytest.raises(UserError, match=r"^process 0 .* \(Connection closed by peer .*\); resume$"),
        lost_processes("resume"),
    ):
        raise RuntimeError(gone)
    assert ignored == [(signal.SIGTERM, signal.SIG_IGN)]
    with pytest.raises(RuntimeError, match="shapes"), lost_processes("resume"):
        raise RuntimeError("shapes")


OPTIONS = {"steps": 5, "dropout": 0.0, "window": 4, "validation_fraction": 0.2}


def launch(folder, processes, *more, script=("-m", "performers"), **options):
    """Arguments that train on the processes of torchrun, or in one."""
    fasta = write_sequences(folder.with_suffix(".fasta"), proteins())
    command = [*script, "train", fasta, "--output", folder, *flags(**{**OPTIONS, **options})]
    return [*launcher(processes), *command, *more]


def trained(*arguments, **options):
    code, _, err = finish(start(*launch(*arguments, **options)), seconds=600)
    assert code == 0, err
    assert "Warning" not in err
    assert err.count("model in") == 1
    return arguments[0]


def check_same(one, many, bound=1e-5):
    """Losses, validations and weights equal those of one process, to rounding."""
    assert losses(many) == pytest.approx(losses(one), rel=bound)
    validations = [
        [entry for entry in history(folder) if "eval_loss" in entry] for folder in (one, many)
    ]
    assert len(validations[0]) == len(validations[1]) == 5
    for ours, theirs in zip(*validations, strict=True):
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=bound)
        assert ours["eval_tokens"] == theirs["eval_tokens"]
    ours, theirs = weights(one), weights(many)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() <= bound * weight.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, {"fsdp": True, "accumulation": 2, "dtype": "bfloat16"}),
        (2, {"sequence_parallel": 2, "objective": "clm", "packed": True, "max_length": 60}),
        (2, {"sequence_parallel": 2, "objective": "clm", "reversible": True}),
        (4, {"sequence_parallel": 2, "gradient_checkpointing": True}),
        (4, {"sequence_parallel": 4, "packed": True, "max_length": 60}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_processes_train_the_model_of_one(processes, options, tmp_path):
    one = {name: x for name, x in options.items() if name not in ("fsdp", "sequence_parallel")}
    readers = processes // options.get("sequence_parallel", 1)
    one["accumulation"] = readers * options.get("accumulation", 1)
    alone = trained(tmp_path / "one", 1, **one)
    many = trained(tmp_path / "many", processes, **options)
    check_same(alone, many)
    kind = PerformerForCausalLM if options.get("objective") == "clm" else PerformerForMaskedLM
    loaded = kind.from_pretrained(many).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in weights(many).items())


# Ends one of the processes as the kernel would, after its fourth step.
_KILLED = """
import os, signal
from performers.cli import main
from performers.training.callbacks import ClockCallback

step_end = ClockCallback.on_step_end

def killed(self, args, state, control, **kwargs):
    step_end(self, args, state, control, **kwargs)
    if state.global_step == 4 and args.process_index == 1:
        print("killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

ClockCallback.on_step_end = killed
main()
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_it_resumes_exactly(tmp_path):
    script, folder = tmp_path / "killed.py", tmp_path / "run"
    script.write_text(_KILLED)
    options = {"sequence_parallel": 2, "dropout": 0.1}
    whole = trained(tmp_path / "whole", 2, **options)

    process = start(*launch(folder, 2, script=(script,), **options))
    assert any(line.strip() == "killed" for line in process.stdout)
    killed = time.monotonic()
    code, _, err = finish(process, seconds=300)
    assert time.monotonic() - killed < 60
    assert code != 0
    assert re.search(r"performers: process 0 lost another one of this run, .* with --resume", err)
    assert not (folder / "config.json").exists()

    trained(folder, 2, "--resume", **options)
    check_same(whole, folder, bound=0)
    assert json.loads((folder / "training.json").read_text())["processes"] == 2
