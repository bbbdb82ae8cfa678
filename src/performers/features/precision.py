"""Keeping autocast out of sums that need all their digits."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context in which autocast changes nothing on a device; any device, meta included."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives its outputs on a device now, or None when it is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
