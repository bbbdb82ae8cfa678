"""Converted models in folders: loaded by `load_performer` and by transformers itself.

Importing this module registers a "quantizer" with transformers, its one place where a package may
change a model between construction and the reading of weights. ``from_pretrained`` of any class,
``pipeline``, sentence-transformers and peft then open a converted folder as a converted model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from performers.convert.families.transformers_models import TransformersModels
from performers.convert.options import Conversion
from performers.convert.record import METHOD, PARTS, RECORD
from performers.convert.to_performer import convert
from performers.models.manifest import check_manifest
from performers.nn import FavorAttention


def load_performer(path: str | Path, *, model_class: Any = None, **options: Any) -> Any:
    """Load a model that `to_performer` converted and ``save_pretrained`` saved.

    The outputs equal those of the model that was saved: random features are part of the weights.
    ``from_pretrained`` of transformers does the same once ``performers.convert`` is imported; this
    function also opens folders of earlier versions, and names the class for you.

    Args:
        path: The folder.
        model_class: Class of the model, for classes of your own; None: the one that was saved.
        **options: For the model class's ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: There is no saved model in ``path``.
        ValueError: The model is not a converted one, its class is not known, its files have
            changed since they were saved, or tensors of its features are missing.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: expected a folder written by save_pretrained"
        )
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (written.get("architectures") or [None])[0]
    if written.get("model_type") == "performer":
        from performers import models

        model_class = model_class or getattr(models, name or "PerformerModel")
        return model_class.from_pretrained(folder, **options)
    if written.get(RECORD) is None:
        raise ValueError(
            f"{folder} holds a {name} that is not converted: load it with transformers and "
            "call to_performer on it"
        )
    check_manifest(folder)
    found = _class(name, folder) if model_class is None else model_class
    if "quantization_config" not in written and "config" not in options:
        # Folders of versions before the registration.
        config = found.config_class.from_pretrained(folder)
        config.quantization_config = {"quant_method": METHOD}
        options["config"] = config
    return found.from_pretrained(folder, **options)


def _class(name: str | None, folder: Path) -> Any:
    """The class of transformers, or of the running program, that a folder names."""
    found = getattr(transformers, name or "", None)
    if found is not None:
        return found
    own = {x for x in _subclasses(transformers.PreTrainedModel) if x.__name__ == name}
    if len(own) == 1:
        return own.pop()
    reason = "several classes of that name exist" if own else "no class of that name is defined"
    raise ValueError(
        f"{folder} holds a {name}, and {reason}: pass it as model_class=, or import the module "
        "that defines it first"
    )


def _subclasses(base: type) -> set[type]:
    direct: list[type] = base.__subclasses__()
    return {x for each in direct for x in (each, *_subclasses(each))}


class _ConvertedConfig(QuantizationConfigMixin):
    """Tells transformers that a folder holds a converted model."""

    def __init__(self, quant_method: str = METHOD, **kwargs: Any) -> None:
        del kwargs
        self.quant_method: Any = quant_method

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


class _ConvertedLoader(HfQuantizer):
    """Builds the features of a converted model before its weights are read.

    No weight is quantized: once loaded, the model is as any other to transformers.
    """

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        record = getattr(model.config, RECORD, None)
        if record is None:
            raise ValueError(
                f"the configuration of {type(model).__name__} has a quantization_config of method "
                f"{METHOD!r} but no settings of a conversion ({RECORD!r}): take the entry out of "
                "config.json if the model is not converted"
            )
        parts = {"": record}
        if PARTS in record:
            parts = record[PARTS]
            # The name in the configuration went to all parts; those that stay exact need another.
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        self._blocks: dict[str, FavorAttention] = {}
        for name, values in parts.items():
            part = model.get_submodule(name)
            family = TransformersModels(part, Conversion.from_record(values), is_loading=True)
            # The draw is replaced by what was saved; the caller's random numbers stay as they are.
            with torch.device("cpu"):
                convert(family, generator=torch.Generator().manual_seed(0))
            for inner, block in part.named_modules():
                if isinstance(block, FavorAttention):
                    self._blocks[".".join(filter(None, (name, inner)))] = block
        self._shapes = {
            name: {key: x.shape for key, x in block.state_dict().items()}
            for name, block in self._blocks.items()
        }
        kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        model._keep_in_fp32_modules_strict = {*kept, "favor"}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        for name, block in self._blocks.items():
            tensors = block.state_dict(keep_vars=True)
            missing = [key for key, tensor in tensors.items() if not _is_read(tensor)]
            if missing:
                raise ValueError(
                    f"the files of {type(model).__name__} have no tensor {name}.{missing[0]}, part "
                    "of the features of a converted layer: save the model again with "
                    "save_pretrained, or convert the original anew"
                )
            for key, tensor in tensors.items():
                if tensor.shape != self._shapes[name][key]:
                    raise ValueError(
                        f"{name}.{key} has shape {tuple(tensor.shape)} in the files of "
                        f"{type(model).__name__}, but its configuration says "
                        f"{tuple(self._shapes[name][key])}: they do not belong together"
                    )
            # Tensors read from a file lie anywhere in memory, and products round by alignment.
            block._apply(torch.clone)
        model.is_quantized = False
        for attribute in ("quantization_method", "hf_quantizer"):
            if attribute in vars(model):
                delattr(model, attribute)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _is_read(tensor: Tensor) -> bool:
    """Whether a tensor came from a file: transformers marks it, and makes the others anew."""
    return tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(_ConvertedConfig)
    register_quantizer(METHOD)(_ConvertedLoader)
