"""Settings of a conversion in the configuration of a model, which is saved with it.

Three entries of ``config.json`` belong together. ``performers`` holds the settings (of a model with
converted parts, those of each part). ``quantization_config`` makes ``from_pretrained`` call
`performers.convert.saving`, which builds the features before the weights are read.
``attn_implementation`` is a name that transformers refuses to run, with the name in its message,
if that registration is missing.
"""

import copy
import gc
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from performers.convert.options import Conversion

RECORD = "performers"
PARTS = "parts"
METHOD = "performers"
IMPLEMENTATION = "favor"
SAVED_IMPLEMENTATION = (
    "favor: pip install 'performers[convert]' and import performers.convert before loading"
)


def read_record(model: Any) -> Conversion | None:
    """Read the settings of a converted model; None for any other."""
    record = getattr(getattr(model, "config", None), RECORD, None)
    return None if record is None or PARTS in record else Conversion.from_record(record)


def write_record(model: Any, conversion: Conversion) -> None:
    """Write the settings to the configuration of a model, and of the model that contains it."""
    _mark(model.config)
    setattr(model.config, RECORD, conversion.record())
    whole = _whole(model)
    if whole is model or whole.config is model.config:
        return
    name = next(name for name, module in whole.named_modules() if module is model)
    _mark(whole.config)
    parts = getattr(whole.config, RECORD, None) or {}
    kept = parts.get(PARTS, {})
    setattr(whole.config, RECORD, {PARTS: {**kept, name: conversion.record()}})


def _mark(config: Any) -> None:
    config.quantization_config = {"quant_method": METHOD}
    config.attn_implementation = SAVED_IMPLEMENTATION


def separate_configurations_(model: Any) -> None:
    """Copy the configuration of a model if other models share the object.

    transformers models read their attention implementation from their configuration at each call.
    """
    whole = _whole(model)
    inside = set(whole.modules())
    configurations = {id(x.config) for x in inside if isinstance(x, PreTrainedModel)}
    if not any(id(x.config) in configurations for x in _models() if x not in inside):
        return
    # One memo: what was one object stays one, nested configurations included.
    memo: dict[int, Any] = {}
    for module in inside:
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, memo)


def _models() -> list[Any]:
    """All transformers models of this process that have a configuration."""
    # isinstance would trigger lazy modules and proxies.
    models = [x for x in gc.get_objects() if issubclass(type(x), PreTrainedModel)]
    return [x for x in models if isinstance(vars(x).get("config"), PreTrainedConfig)]


def _whole(model: nn.Module) -> Any:
    """Find the largest transformers model that contains a model, or return the model."""
    holders = [x for x in _models() if any(module is model for module in x.modules())]
    return max(holders, key=lambda x: sum(1 for _ in x.modules()), default=model)
