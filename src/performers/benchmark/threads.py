"""Torch's number of threads for the time of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads_of_torch(number: int | None) -> Iterator[int]:
    """Give torch a number of threads, and what it had before afterwards.

    Args:
        number: Threads; None changes nothing.

    Yields:
        The number in force.
    """
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
