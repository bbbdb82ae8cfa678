"""A run that was stopped, anyhow, continues to the numbers of one that was not."""

import json
import os
import shutil
import signal
from functools import partial

import pytest

from performers.app.errors import Interrupted, UserError
from performers.training.checkpoints import newest_checkpoint
from performers.training.run import check_same_run
from tests.proteins import runs
from tests.proteins.runs import (
    finish,
    history,
    losses,
    proteins,
    same_weights,
    small_options,
    start,
    weights,
)

# Dropout is on, and features are redrawn before and after each stop.
STEPS = {"steps": 8, "save_steps": 3, "redraw_steps": 2, "dropout": 0.2}


train = partial(runs.train, **STEPS)


def stop_at(step, number=signal.SIGINT):
    """A progress callback that sends this process a signal, once, at the end of a step."""

    def progress(done, total, log):
        if done == step and not log:
            os.kill(os.getpid(), number)

    return progress


def interrupt(folder, step, number=signal.SIGINT, **options):
    with pytest.raises(Interrupted) as caught:
        train(folder, progress=stop_at(step, number), **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def assert_same_run(folder, whole):
    assert len(losses(whole)) == 8
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    assert same_weights(folder, whole)
    steps = [entry["step"] for entry in history(folder) if "loss" in entry]
    assert steps == sorted(set(steps)), "no step is logged twice"


@pytest.mark.exhaustive
def test_a_run_killed_between_checkpoints(tmp_path, whole):
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from performers.training.options import TrainingOptions\n"
        "from performers.proteins.training.train import train_model\n"
        "import json\n"
        "sequences, options, folder = json.loads(sys.argv[1])\n"
        "def progress(done, total, log):\n"
        "    if done == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "train_model(sequences, Path(folder), TrainingOptions(**options), progress=progress)\n"
    )
    given = [proteins(), small_options(**STEPS).to_dict(), str(tmp_path)]
    code, _, err = finish(start("-c", script, json.dumps(given)))
    assert code == -signal.SIGKILL, err
    assert not (tmp_path / "config.json").exists()
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-3"
    train(tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGINT), (4, signal.SIGTERM)])
def test_a_run_stopped_by_a_signal_saves_and_says_how_to_go_on(tmp_path, whole, step, number):
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    message = interrupt(tmp_path, step, number)
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == handlers
    stopped = int(message.split()[3])
    # The signal came at the end of a step: the run stops there or one step on.
    assert stopped - step in (0, 1)
    assert f"stopped after step {stopped} of 8" in message
    assert "--resume" in message
    assert not (tmp_path / "config.json").exists()
    newest = newest_checkpoint(tmp_path / "checkpoints")
    assert newest.name == f"checkpoint-{stopped}"
    train(tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_a_run_with_muon_is_another_and_continues_too(tmp_path, whole):
    train(tmp_path / "muon", optimizer="muon")
    assert losses(tmp_path / "muon") != pytest.approx(losses(whole), abs=1e-5)
    interrupt(tmp_path / "stopped", 4, optimizer="muon")
    train(tmp_path / "stopped", resume=True, optimizer="muon")
    assert_same_run(tmp_path / "stopped", tmp_path / "muon")


def test_a_second_signal_interrupts_at_once(tmp_path, whole):
    def progress(done, total, log):
        if done == 4 and not log:
            # Two that are sent from outside at once could arrive as one.
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    # A process started in the background of a shell ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "config.json").exists()
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-3"
    train(tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


@pytest.mark.exhaustive
def test_a_run_stopped_again_and_again(tmp_path, whole):
    for step in (1, 3, 5):
        interrupt(tmp_path, step, resume=step > 1)
    result = train(tmp_path, resume=True)
    assert_same_run(tmp_path, whole)
    assert result["steps"] == 8
    assert result["seconds"] > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        {"objective": "clm", "packed": True, "accumulation": 2},
        {"attention": "exact", "packed": True, "across_sequences": True},
        {"attention": "favor-relu", "bf16": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_every_kind_of_run_resumes(tmp_path, options):
    train(tmp_path / "whole", **options)
    interrupt(tmp_path / "parts", 5, **options)
    train(tmp_path / "parts", resume=True, **options)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_finished_run_resumes_to_itself(tmp_path, whole):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = json.loads((folder / "training.json").read_text())["result"]
    result = train(folder, resume=True)
    assert result == {**before, "seconds": result["seconds"]}
    assert result["seconds"] == pytest.approx(before["seconds"], abs=0.02)
    assert_same_run(folder, whole)
    assert len([e for e in history(folder) if "eval_loss" in e]) == len(
        [e for e in history(whole) if "eval_loss" in e]
    )
    # And one interrupted while its model was saved.
    (folder / "config.json").unlink()
    (folder / ".saving-1").mkdir()
    train(folder, resume=True)
    assert_same_run(folder, whole)
    assert weights(folder).keys() == weights(whole).keys()


def test_how_a_run_is_watched_may_change(tmp_path, whole):
    folder = tmp_path / "run"
    interrupt(folder, 4)
    train(folder, resume=True, save_steps=1, eval_steps=2)
    assert_same_run(folder, whole)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["checkpoint-7", "checkpoint-8"], "the new interval is the one that counts"
    assert {6, 8} <= {entry["step"] for entry in history(folder) if "eval_loss" in entry}


def test_a_run_without_a_checkpoint_begins_anew(tmp_path, whole):
    """One whose checkpoints are gone, and one stopped when it was done."""
    interrupt(tmp_path / "gone", 1)
    shutil.rmtree(tmp_path / "gone" / "checkpoints")
    train(tmp_path / "gone", resume=True, progress=stop_at(7))
    assert_same_run(tmp_path / "gone", whole)


@pytest.mark.parametrize(
    ("sequences", "options", "processes", "message"),
    [
        (None, {"num_layers": 1}, 1, "--layers was 2, now 1"),
        (None, {"seed": 3}, 1, "--seed was 0, now 3"),
        (None, {"steps": 9}, 1, "--steps was 8, now 9"),
        (None, {"packed": True}, 1, "--packed was False, now True"),
        *[
            (sequences, {}, 1, "the data are not the same; give the same files")
            for sequences in (proteins(seed=1), proteins()[::-1], proteins()[:-1])
        ],
        (None, {}, 2, "ran in 1 processes and this in 2; start as many"),
    ],
)
def test_another_run_is_refused(
    tmp_path, whole, monkeypatch, sequences, options, processes, message
):
    folder = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=message):
        train(folder, resume=True, sequences=sequences, **options)
    assert_same_run(folder, whole)


def test_a_record_older_than_runs_of_several_processes_is_of_one(tmp_path, whole):
    earlier = json.loads((whole / "training.json").read_text())
    assert earlier.pop("processes") == 1
    (tmp_path / "training.json").write_text(json.dumps(earlier))
    record = {**earlier, "processes": 2}
    with pytest.raises(UserError, match="ran in 1 processes and this in 2"):
        check_same_run(tmp_path / "training.json", record, small_options(**STEPS))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *[("training.json", content, r"training\.json") for content in ("[]", "{}", "{")],
        ("thesis.tex", "kept", r"has no training\.json, so it holds no run to continue"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        train(tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
