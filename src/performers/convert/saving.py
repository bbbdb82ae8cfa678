"""Loading of converted models from folders, by `load_performer` and by transformers itself.

Importing this module registers a "quantizer" with transformers, the only extension point between
the construction of a model and the reading of its weights. ``from_pretrained`` of any class,
``pipeline``, sentence-transformers and peft then open a converted folder as a converted model.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from performers.convert.families.transformers_models import TransformersModels
from performers.convert.hub import model_folder
from performers.convert.options import Conversion
from performers.convert.record import METHOD, PARTS, RECORD
from performers.convert.to_performer import convert
from performers.models.manifest import check_manifest
from performers.nn import FavorAttention


def load_performer(path: str | Path, *, model_class: Any = None, **options: Any) -> Any:
    """Load a model that `to_performer` converted and ``save_pretrained`` saved.

    The outputs equal those of the saved model: random features are part of the weights.
    ``from_pretrained`` of transformers does the same once ``performers.convert`` is imported; this
    function also opens folders of earlier versions, and finds the class.

    Args:
        path: The folder, or the name of a model on the Hugging Face Hub.
        model_class: Class of the model; None: the class with the saved name.
        **options: Options of the class's ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: ``path`` holds no saved model, or the Hub has none of that name.
        ValueError: The model is not a converted one, its class is unknown, its files have changed
            since they were saved, or tensors of its features are missing.
    """
    folder = model_folder(path, "path")
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
    model_class = model_class or getattr(transformers, name or "", None)
    if model_class is None:
        defined = {x for x in _subclasses(transformers.PreTrainedModel) if x.__name__ == name}
        if len(defined) != 1:
            reason = "several classes of that name exist"
            if not defined:
                reason = "no class of that name is defined"
            raise ValueError(
                f"{folder} holds a {name}, and {reason}: pass it as model_class=, or import the "
                "module that defines it first"
            )
        model_class = defined.pop()
    if "quantization_config" not in written and "config" not in options:
        # Folders of versions before the registration.
        config = model_class.config_class.from_pretrained(folder)
        config.quantization_config = {"quant_method": METHOD}
        options["config"] = config
    return model_class.from_pretrained(folder, **options)


def _subclasses(base: type) -> set[type]:
    direct: list[type] = base.__subclasses__()
    return {x for each in direct for x in (each, *_subclasses(each))}


class _ConvertedConfig(QuantizationConfigMixin):
    """Marks the configuration of a converted model."""

    def __init__(self, quant_method: str = METHOD, **kwargs: Any) -> None:
        self.quant_method: Any = quant_method

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


class _ConvertedLoader(HfQuantizer):
    """Builds the features of a converted model before its weights are read.

    No weight is quantized: the loaded model has no mark of a quantizer.
    """

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
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
            # The implementation in the configuration applies to all parts, exact ones included.
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        for name, values in parts.items():
            conversion = Conversion.from_record(values)
            family = TransformersModels(model.get_submodule(name), conversion, is_loading=True)
            # The draw is overwritten; the caller's random numbers are not used.
            with torch.device("cpu"):
                convert(family, generator=torch.Generator().manual_seed(0))
        modules = model.named_modules()
        self._blocks = {name: x for name, x in modules if isinstance(x, FavorAttention)}
        self._shapes = {
            (name, key): tensor.shape
            for name, block in self._blocks.items()
            for key, tensor in block.state_dict().items()
        }
        kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        model._keep_in_fp32_modules_strict = {*kept, "favor"}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, block in self._blocks.items():
            for key, tensor in block.state_dict(keep_vars=True).items():
                # transformers marks tensors that came from a file, and initialises the others.
                if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)):
                    raise ValueError(
                        f"the files of {type(model).__name__} have no tensor {name}.{key}, part "
                        "of the features of a converted layer: save the model again with "
                        "save_pretrained, or convert the original anew"
                    )
                if tensor.shape != self._shapes[name, key]:
                    raise ValueError(
                        f"{name}.{key} has shape {tuple(tensor.shape)} in the files of "
                        f"{type(model).__name__}, but its configuration says "
                        f"{tuple(self._shapes[name, key])}: they do not belong together"
                    )
            # Products round by the alignment of tensors, which files do not keep.
            block._apply(torch.clone)
        model.is_quantized = False
        for attribute in {"quantization_method", "hf_quantizer"} & vars(model).keys():
            delattr(model, attribute)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(_ConvertedConfig)
    register_quantizer(METHOD)(_ConvertedLoader)
