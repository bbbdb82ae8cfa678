"""Devices of torch, and messages of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers

from performers.app.errors import UserError


def available_device(name: str | None) -> torch.device:
    """The device of a name; for None a CUDA device where there is one, and else the CPU.

    Raises:
        UserError: The name is none of a device, or the device is not available.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        usable = "cpu" if accelerator is None else f"cpu or {accelerator.type}"
        reason = str(error).partition("\n")[0][:120]
        raise UserError(
            f"device {name} is not available ({reason}); the devices here are {usable}"
        ) from error
    return device


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context in which transformers shows neither progress bars nor warnings of its own."""
    logging = transformers.utils.logging
    shows_progress, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
