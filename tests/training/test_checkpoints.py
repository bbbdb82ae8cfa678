"""Damaged checkpoints are never resumed from: the one before is, or the run is refused."""

import json
import logging
import os
import shutil
from functools import partial

import pytest

from performers.app.errors import UserError
from performers.models.manifest import write_manifest
from performers.training.checkpoints import newest_checkpoint
from tests.proteins import runs
from tests.proteins.runs import losses, same_weights

OPTIONS = {"steps": 5, "save_steps": 2, "redraw_steps": 2, "dropout": 0.2}
NEEDED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
OTHERS = ["config.json", "trainer_state.json", "training_args.bin", "manifest.json"]


train = partial(runs.train, **OPTIONS)


def delete(path):
    path.unlink()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def change(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A run that ended without a word after step 4 of 5; its checkpoints are of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("broken") / "run"

    def progress(done, total, log):
        if done == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(folder, progress=progress)
    return folder


@pytest.fixture
def folder(broken_off, tmp_path):
    return shutil.copytree(broken_off, tmp_path / "run")


@pytest.fixture
def checkpoints(folder):
    return folder / "checkpoints"


def test_checkpoints_of_another_number_of_processes(checkpoints):
    """They hold what fewer processes need, but batches would be others."""
    for step in (2, 4):
        checkpoint = checkpoints / f"checkpoint-{step}"
        state = checkpoint / "rng_state.pth"
        for process in range(3):
            shutil.copy(state, checkpoint / f"rng_state_{process}.pth")
        state.unlink()
        write_manifest(checkpoint)
    assert newest_checkpoint(checkpoints, processes=3).name == "checkpoint-4"
    for processes in (1, 2, 4):
        with pytest.raises(ValueError, match=f"by 3 processes, and this run has {processes}: sta"):
            newest_checkpoint(checkpoints, processes=processes)


def test_a_manifest_lists_every_file_of_a_checkpoint(checkpoints):
    newest = checkpoints / "checkpoint-4"
    names = {path.name for path in newest.iterdir()}
    assert names == {*NEEDED, *OTHERS}
    listed = json.loads((newest / "manifest.json").read_text())["files"]
    assert listed.keys() == names - {"manifest.json"}
    assert newest_checkpoint(checkpoints) == newest


@pytest.mark.parametrize("name", [*NEEDED, *OTHERS])
@pytest.mark.parametrize("damage", [delete, truncate, zero, change])
def test_the_checkpoint_before_stands_in_for_a_damaged_one(checkpoints, name, damage, caplog):
    damage(checkpoints / "checkpoint-4" / name)
    found = newest_checkpoint(checkpoints)
    assert found.name == "checkpoint-2"
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    # A changed byte of the manifest may be one of another file's hash.
    assert record.message.startswith(f"{checkpoints}: cannot use checkpoint-4 (")
    assert f"{name} " in record.message or f" {name});" in record.message
    assert record.message.endswith("); resuming from checkpoint-2")


def test_a_resumed_run_says_so_in_one_line_and_ends_with_the_same_numbers(
    folder, whole, monkeypatch, capsys
):
    newest = folder / "checkpoints" / "checkpoint-4"
    change(newest / "optimizer.pt")
    (newest / "left.bin").touch()
    with monkeypatch.context() as patched:
        # As in a program that configures no logging.
        patched.setattr(logging.root, "handlers", [])
        train(folder, resume=True)
    assert capsys.readouterr().err == (
        f"{folder / 'checkpoints'}: cannot use checkpoint-4 (optimizer.pt does not match its "
        "SHA-256 in manifest.json); resuming from checkpoint-2\n"
    )
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    assert same_weights(folder, whole)
    assert newest_checkpoint(folder / "checkpoints").name == "checkpoint-5"
    assert not (newest / "left.bin").exists(), "remains are no part of its successor"


@pytest.mark.parametrize("damage", [delete, change])
def test_a_run_without_an_undamaged_checkpoint_is_refused(folder, checkpoints, damage):
    before = sorted(folder.rglob("*"))
    for path in checkpoints.glob("*/rng_state.pth"):
        damage(path)
    with pytest.raises(UserError) as caught:
        train(folder, resume=True)
    message = str(caught.value)
    assert message.startswith(
        f"--resume: {checkpoints} has no usable checkpoint: checkpoint-4 (rng"
    )
    assert message.count("rng_state.pth") == 2
    assert f"delete {checkpoints} to start anew" in message
    assert "\n" not in message
    assert {*before} >= {*folder.rglob("*")}


def test_a_checkpoint_that_was_being_written_is_none(checkpoints, caplog):
    """Its folder may have no manifest yet, or one without what is saved after the weights."""
    (checkpoints / "checkpoint-6").mkdir()
    assert newest_checkpoint(checkpoints).name == "checkpoint-4"
    newest = checkpoints / "checkpoint-4"
    manifest = newest / "manifest.json"
    content = json.loads(manifest.read_text())
    kept = {name: content["files"][name] for name in ("config.json", "model.safetensors")}
    manifest.write_text(json.dumps({**content, "files": kept}))
    assert newest_checkpoint(checkpoints).name == "checkpoint-2"
    assert "checkpoint-4 (its saving had not ended)" in caplog.text
    shutil.rmtree(checkpoints / "checkpoint-2")
    assert newest_checkpoint(checkpoints) is None
    assert caplog.messages[-1].endswith("(its saving had not ended); starting anew")
