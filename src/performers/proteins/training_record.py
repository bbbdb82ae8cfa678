"""What identifies a training run, so that it is resumed as itself or not at all."""

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from performers.proteins.corpus import TokenShards
from performers.proteins.errors import UserError
from performers.proteins.folders import read_json
from performers.proteins.options import TrainingOptions
from performers.proteins.processes import process_count


def run_record(
    options: TrainingOptions, training: Sequence[str] | TokenShards, validation: Sequence[str]
) -> dict[str, Any]:
    """What ``training.json`` says of a run: its options, a fingerprint of its data, its processes.

    Args:
        options: What the run is asked to do.
        training: Proteins to train on, or a split of a corpus.
        validation: Proteins to validate on.

    Returns:
        Plain data.
    """
    digest = hashlib.sha256()
    if isinstance(training, TokenShards):
        residues = training.entry["residues"]
        digest.update(training.fingerprint().encode())
        groups = [validation]
    else:
        residues = sum(map(len, training))
        groups = [training, validation]
    for group in groups:
        for sequence in group:
            digest.update(sequence.encode() + b"\n")
        digest.update(b"\n")
    data = {
        "sequences": len(training),
        "residues": residues,
        "validation_sequences": len(validation),
        "sha256": digest.hexdigest(),
    }
    return {"options": options.to_dict(), "data": data, "processes": process_count()}


def check_same_run(settings: Path, record: dict[str, Any], options: TrainingOptions) -> None:
    """Check that a run is the one that a folder holds.

    Args:
        settings: The ``training.json`` of the run in the folder.
        record: The ``run_record`` of the run that is to continue it.
        options: Its options.

    Raises:
        UserError: It is another run; the message says in what.
    """
    earlier = read_json(settings)
    if not isinstance(earlier, dict) or not {"options", "data"} <= earlier.keys():
        raise UserError(f"{settings} is not the record of a training run; give another --output")
    changed = options.differences(earlier["options"])
    if changed:
        raise UserError(
            f"--resume continues the run in the folder, but {'; '.join(changed)}; repeat the "
            "options of that run, or give another --output"
        )
    if earlier["data"].get("sha256") != record["data"]["sha256"]:
        raise UserError(
            "--resume continues the run in the folder, but the sequences are not the same; give "
            "the same FASTA files, or another --output"
        )
    if earlier.get("processes", 1) != record["processes"]:
        raise UserError(
            f"--resume continues the run in the folder, but that ran in {earlier['processes']} "
            f"processes and this in {record['processes']}; start as many, or give another --output"
        )


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose saving had ended, in every process of the run.

    The first process writes its log last. The others each write their random state, which may be
    later, and without which they would be resumed with another one, unsaid.
    """
    count = process_count()
    names = ["rng_state.pth"] if count == 1 else [f"rng_state_{i}.pth" for i in range(count)]
    steps = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    }
    for step in sorted(steps, reverse=True):
        try:
            state = read_json(steps[step] / "trainer_state.json")
        except UserError:
            continue
        # An archive without its end is none.
        whole = all(zipfile.is_zipfile(steps[step] / name) for name in names)
        if whole and isinstance(state, dict) and state.get("global_step") == step:
            return steps[step]
    return None
