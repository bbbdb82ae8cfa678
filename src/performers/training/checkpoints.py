"""Checkpoints of a training run, verified before a run resumes from them."""

import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer

from performers.app.processes import is_first_process
from performers.models.manifest import MANIFEST, find_damage, read_manifest, write_manifest

_LOG = logging.getLogger("performers")

_UNFINISHED = "its saving had not ended"


class CheckpointTrainer(Trainer):
    """Trainer that writes a manifest into each checkpoint once every process has saved."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            # Files of a damaged checkpoint of the same step must not enter the manifest.
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            # An empty manifest marks the checkpoint as unfinished.
            write_manifest(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder)


def newest_checkpoint(folder: Path, *, processes: int = 1) -> Path | None:
    """The newest ``checkpoint-N`` in a folder that is complete and undamaged.

    The first process logs newer ones, which are skipped, to the logger ``performers``.

    Returns:
        The checkpoint; None if no saving was completed and the run starts anew.

    Raises:
        ValueError: There are complete checkpoints and all are damaged, or the newest that is not is
            that of another number of processes, which would read other batches.
    """
    steps = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    }
    newest, faults = None, {}
    for _, checkpoint in sorted(steps.items(), reverse=True):
        fault = _fault(checkpoint)
        if fault is None:
            newest = checkpoint
            break
        faults[checkpoint.name] = fault
    listed = ", ".join(f"{name} ({fault})" for name, fault in faults.items())
    if newest is None and set(faults.values()) - {_UNFINISHED}:
        raise ValueError(
            f"{folder} has no usable checkpoint: {listed}; restore the files from a copy, or "
            f"delete {folder} to start anew"
        )
    saved = 0 if newest is None else len(list(newest.glob("rng_state*.pth")))
    if saved not in (0, processes):
        raise ValueError(
            f"{newest} was saved by {saved} processes, and this run has {processes}: start as "
            "many, or begin anew in another folder"
        )
    if faults and is_first_process():
        what = "starting anew" if newest is None else f"resuming from {newest.name}"
        _LOG.warning("%s: cannot use %s; %s", folder, listed, what)
    return newest


def _fault(checkpoint: Path) -> str | None:
    """Reason why a run cannot resume from a checkpoint; None if it can."""
    damage = find_damage(checkpoint)
    if damage is not None:
        return damage
    manifest = read_manifest(checkpoint)
    # Written last, before the manifest.
    last = "trainer_state.json"
    if manifest is None and (checkpoint / last).exists():
        return f"{MANIFEST} is missing"
    return None if last in (manifest or {}) else _UNFINISHED
