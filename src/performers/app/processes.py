"""Processes of one run, as launchers such as torchrun number them."""

import os


def is_first_process() -> bool:
    """Return True in the process that checks, prints and saves."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_share() -> float:
    """Share of the processes of the run that are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", process_count())) / process_count()
