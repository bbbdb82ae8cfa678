"""Converted models in folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from performers.convert.block import BLOCK, FavorBlock
from performers.convert.settings import ConversionSettings
from performers.convert.swap import RECORD, convert_transformers_model

__all__ = ["load_performer"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def load_performer(path: str | Path, **options: Any) -> Any:
    """Load a model that `to_performer` converted and ``save_pretrained`` saved.

    The outputs equal those of the model that was saved: random features are part of the weights.
    The same folder opened with the original class, without this function, is the exact model.

    Args:
        path: The folder.
        **options: For the model class's ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Returns:
        The model, of the class that was saved, in evaluation mode.

    Raises:
        FileNotFoundError: There is no saved model in ``path``.
        ValueError: The model is not a converted one, or tensors of its features are missing.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: expected a folder written by save_pretrained"
        )
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = written.get("architectures") or [None]
    if written.get("model_type") == "performer":
        from performers import models

        return getattr(models, names[0] or "PerformerModel").from_pretrained(folder, **options)
    record = written.get(RECORD)
    if record is None:
        raise ValueError(
            f"{folder} holds a {names[0]} that is not converted: load it with transformers and "
            "call to_performer on it"
        )
    model_class = getattr(transformers, names[0] or "", None)
    if model_class is None:
        raise ValueError(f"{folder}: transformers has no class {names[0]}")
    settings = ConversionSettings.from_record(record)
    verbosity = transformers_logging.get_verbosity()
    # Tensors of the features are no part of the original class, which would say so at length.
    transformers_logging.set_verbosity_error()
    try:
        model = model_class.from_pretrained(folder, **options)
    finally:
        transformers_logging.set_verbosity(verbosity)
    delattr(model.config, RECORD)
    # The draw is replaced by what was saved; it must not disturb the caller's random numbers.
    generator = torch.Generator().manual_seed(0)
    convert_transformers_model(model, settings, generator=generator, warn=False)
    _load_blocks(model, folder, settings)
    return model.eval()


def _load_blocks(model: nn.Module, folder: Path, settings: ConversionSettings) -> None:
    saved: dict[str, Tensor] = {}
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            saved.update((x, tensors.get_tensor(x)) for x in names if f".{BLOCK}." in x)
    blocks = {name: x for name, x in model.named_modules() if isinstance(x, FavorBlock)}
    if settings.learned:
        for block in blocks.values():
            block.learn_(block.feature_map.form().num_heads())
    for name, block in blocks.items():
        own = {f"{name}.{key}": value for key, value in block.state_dict().items()}
        # Some models are saved under other names than their modules have.
        files = {id(value): key for key, value in revert_weight_conversion(model, own).items()}
        found: dict[str, Tensor] = {}
        for key, value in own.items():
            tensor = saved.get(key, saved.get(files.get(id(value), key)))
            if tensor is None:
                raise ValueError(f"{folder} has no tensor {key}, part of the features of a layer")
            found[key.removeprefix(f"{name}.")] = tensor
        block.load_state_dict(found)


def _files(folder: Path) -> Iterator[Path]:
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        yield from (folder / name for name in sorted(set(index["weight_map"].values())))
    elif (folder / _SINGLE).is_file():
        yield folder / _SINGLE
    else:
        raise FileNotFoundError(f"{folder} has no {_SINGLE}: save it with save_pretrained")
