"""Autocast: suspended in sums that need full precision, and its present dtype."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context without autocast on a device; a no-op where autocast does not exist."""
    # torch.compile (2.6) cannot trace torch.amp.is_autocast_available.
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device, or None when it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
