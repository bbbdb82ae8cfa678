"""Keeping autocast out of sums that need all their digits."""

from contextlib import AbstractContextManager, nullcontext

import torch

# torch.amp.is_autocast_available would tell, but torch.compile (2.6) cannot trace it.
_WITHOUT_AUTOCAST = ("meta",)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context in which autocast changes nothing on a device; any device, meta included."""
    if device.type in _WITHOUT_AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives its outputs on a device now, or None when it is off."""
    if device.type in _WITHOUT_AUTOCAST or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
