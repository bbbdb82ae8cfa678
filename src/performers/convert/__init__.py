"""Conversion of pretrained Transformers into Performers: convert, calibrate, distil, save, load.

Importing this package registers the attention implementation ``"favor"`` with transformers, where
that is installed, and lets its ``from_pretrained`` open the folders of converted models.
"""

import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from performers.convert.interface.positions import extend_positions_
from performers.convert.to_performer import to_performer

if TYPE_CHECKING:
    from performers.convert.distillation.stages import Distillation
    from performers.convert.distillation.training import distill
    from performers.convert.saving import load_performer

__all__ = ["Distillation", "distill", "extend_positions_", "load_performer", "to_performer"]

_PLACES = {
    "Distillation": "performers.convert.distillation.stages",
    "distill": "performers.convert.distillation.training",
    "load_performer": "performers.convert.saving",
}


def __getattr__(name: str) -> Any:
    """Import what needs transformers when it is asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("transformers", "safetensors", "accelerate"):
            raise
        raise ModuleNotFoundError(
            f"performers.convert.{name} needs {error.name}: pip install 'performers[convert]'",
            name=error.name,
        ) from error


if importlib.util.find_spec("transformers") is not None:
    try:
        importlib.import_module("performers.models")
    except ImportError as _error:
        # Torch models need no transformers; those who do not convert others lose nothing.
        logging.getLogger("performers").warning("%s", _error)
    else:
        for _module in ("interface.implementation", "saving"):
            importlib.import_module(f"performers.convert.{_module}")
