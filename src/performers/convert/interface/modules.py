"""Modules of a transformers model that go through its attention interface."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType

from torch import nn

__all__ = ["forward_code", "interface_modules"]

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def interface_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose forward pass calls transformers' attention interface, with their names."""
    for name, module in model.named_modules():
        code = forward_code(module)
        if code is not None and _INTERFACE in code.co_names:
            yield name, module


def forward_code(module: nn.Module) -> CodeType | None:
    """Code of a module's forward pass, or None."""
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)
