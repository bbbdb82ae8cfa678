"""Record of a training run, so that it is resumed as itself or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.files import read_json
from performers.app.processes import process_count
from performers.training.checkpoints import newest_checkpoint
from performers.training.options import TrainingOptions


def check_same_run(settings: Path, record: dict[str, Any], options: TrainingOptions) -> None:
    """Check the record and options of a run against the ``training.json`` that it is to continue.

    Raises:
        UserError: The folder holds another run; the message names the difference.
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
            "--resume continues the run in the folder, but the data are not the same; give the "
            "same files, or another --output"
        )
    processes = earlier.get("processes", 1)
    if processes != record["processes"]:
        raise UserError(
            f"--resume continues the run in the folder, but that ran in {processes} "
            f"processes and this in {record['processes']}; start as many, or give another --output"
        )


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint whose saving had ended, in every process of the run.

    Raises:
        UserError: All checkpoints of the run are damaged.
    """
    try:
        return newest_checkpoint(folder, processes=process_count())
    except ValueError as error:
        raise UserError(f"--resume: {error}") from error
