"""Checkpoints of a training run, verified before a run resumes from them."""

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState

from performers.models.manifest import find_damage, read_manifest, write_manifest

_LOG = logging.getLogger("performers")

_STATE = "trainer_state.json"
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


def newest_checkpoint(folder: Path, *, processes: int = 1, sharded: bool = False) -> Path | None:
    """The newest checkpoint that is complete and undamaged.

    The first process logs newer ones, which are skipped, to the logger ``performers``.

    ``folder`` has the ``checkpoint-N`` folders of a run, with a random state of each process. The
    optimizer of a ``sharded`` run is saved in parts under names of its library (FSDP, DeepSpeed).

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
    names = ["rng_state.pth"] if processes == 1 else []
    names = names or [f"rng_state_{process}.pth" for process in range(processes)]
    if not sharded:
        names = ["optimizer.pt", "scheduler.pt", *names]
    newest, faults = None, {}
    for step in sorted(steps, reverse=True):
        fault = _fault(steps[step], step, names, processes, weights=not sharded)
        if fault is None:
            newest = steps[step]
            break
        faults[steps[step].name] = fault
    if not faults:
        return newest
    listed = ", ".join(f"{name} ({fault})" for name, fault in faults.items())
    if newest is None and set(faults.values()) != {_UNFINISHED}:
        raise ValueError(
            f"{folder} has no usable checkpoint: {listed}; restore the files from a copy, or "
            f"delete {folder} to start anew"
        )
    if int(os.environ.get("RANK", "0")) == 0:
        what = "starting anew" if newest is None else f"resuming from {newest.name}"
        _LOG.warning("%s: cannot use %s; %s", folder, listed, what)
    return newest


def _fault(
    checkpoint: Path, step: int, names: list[str], processes: int, *, weights: bool
) -> str | None:
    """Reason why a run cannot resume from a checkpoint; None if it can."""
    damage = find_damage(checkpoint)
    if damage is not None:
        return damage
    manifest = read_manifest(checkpoint)
    state = checkpoint / _STATE
    # Written last, before the manifest: the only sign of the end without a manifest.
    if not (_is_json(state) if manifest is None else _STATE in manifest):
        return _UNFINISHED
    saved = len(list(checkpoint.glob("rng_state_*.pth"))) or int(
        (checkpoint / "rng_state.pth").exists()
    )
    # Without a manifest a missing file is no sign of fewer.
    if saved > processes or (manifest is not None and saved not in (0, processes)):
        raise ValueError(
            f"{checkpoint} was saved by {saved} processes, and this run has {processes}: start as "
            "many, or begin anew in another folder"
        )
    for name in names:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        # A truncated archive is not a zip file.
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is cut off or not a file of torch.save"
    if weights and not any(checkpoint.glob("*.safetensors")):
        return "the weights are missing"
    try:
        found = TrainerState.load_from_json(str(state)).global_step
    except (TypeError, ValueError) as error:
        return f"{_STATE} does not describe a run ({error})"
    return None if found == step else f"{_STATE} is of step {found}"


def _is_json(path: Path) -> bool:
    # Opening a FIFO would wait for a writer.
    if not path.is_file():
        return False
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return True
