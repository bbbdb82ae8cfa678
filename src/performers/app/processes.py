"""Which of the processes of one run this is, as launchers such as torchrun tell it."""

import os


def is_first_process() -> bool:
    """Whether this process speaks for the run: it checks, prints and saves."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """Processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))
