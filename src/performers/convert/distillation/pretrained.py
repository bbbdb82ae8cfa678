"""Pretrained transformers models in local folders, read without the network."""

import contextlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from performers.training.environment import quiet_transformers

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model in evaluation mode and float32, and its tokenizer or None."""

    path: Path
    model: Any
    tokenizer: Any

    @property
    def is_causal(self) -> bool:
        """True if the attention of the model is causal."""
        return bool(getattr(self.model.config, "is_causal", True)) and any(
            getattr(module, "is_causal", False) for module in self.model.modules()
        )


def load_model(path: str | Path, *, head: bool = True) -> LoadedModel:
    """Load a pretrained model and its tokenizer from a local folder or GGUF file.

    A folder without tokenizer files may have its ``vocab.txt`` in the folder above it; a bare
    ``vocab.txt`` is a BERT vocabulary, cased if it has tokens in upper case.

    Args:
        path: A folder with ``config.json`` and safetensors or ``pytorch_model.bin``, a ``.gguf``
            file, or a folder with one.
        head: Load the language-modelling head, if the files have one.

    Raises:
        FileNotFoundError: The path, the configuration or the weights are missing.
        ImportError: A GGUF file, and the package gguf is not installed.
        ValueError: The files cannot be read as a model, or lack some of its weights.
    """
    folder, gguf = _locate(Path(path))
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf is not None:
        if importlib.util.find_spec("gguf") is None:
            raise ImportError(
                f"{folder / gguf} is a GGUF file, which transformers reads with the package gguf; "
                "install it with pip install gguf"
            )
        source["gguf_file"] = gguf
    try:
        # The bar of a GGUF file ignores the settings of transformers.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            config = transformers.AutoConfig.from_pretrained(folder, **source)
            classes = [_head_class(config) if head else None, transformers.AutoModel]
            for model_class in filter(None, classes):
                model, missing = _model(folder, config, model_class, source)
                if not missing:
                    break
            tokenizer = _tokenizer(folder, config, source)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be loaded as a transformers model: {error}") from error
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, the first of them "
            f"{missing[0]}"
        )
    return LoadedModel(Path(path), model.eval(), tokenizer)


def _locate(path: Path) -> tuple[Path, str | None]:
    """Find the folder to read, and the name of the GGUF file in it or None."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ValueError(f"{path} is a file: expected a model folder or a .gguf file")
        return path.parent, path.name
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such model folder or .gguf file")
    has_config = (path / "config.json").is_file()
    if has_config and any((path / name).is_file() for name in _WEIGHTS):
        return path, None
    found = sorted(entry.name for entry in path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{path} has {len(found)} .gguf files, {', '.join(found)}: name one")
    if found:
        return path, found[0]
    wanted = f"weights ({' or '.join(_WEIGHTS[::2])})" if has_config else "config.json"
    raise FileNotFoundError(f"{path} has no {wanted}: expected a folder saved by save_pretrained")


def _model(
    folder: Path, config: Any, model_class: Any, source: dict[str, Any]
) -> tuple[Any, list[str]]:
    """Load the model; returns it with the names of the weights that its files lack."""
    model, report = model_class.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, **source
    )
    if "gguf_file" in source:
        # The weights are float32 now; transformers would refuse to train quantized ones.
        for name in {"is_quantized", "quantization_method", "hf_quantizer"} & vars(model).keys():
            delattr(model, name)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    # Heads on top of the encoder's output change no attention.
    return model, sorted(name for name in report["missing_keys"] if "pooler" not in name)


def _head_class(config: Any) -> Any:
    """Class of the model with a language-modelling head, or None."""
    # Encoders such as BERT are in both tables and told apart by is_decoder.
    is_masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if is_masked and not getattr(config, "is_decoder", False):
        return transformers.AutoModelForMaskedLM
    if is_masked or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return None


def _tokenizer(folder: Path, config: Any, source: dict[str, Any]) -> Any:
    def has(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    if "gguf_file" in source or any(map(has, _TOKENIZERS)) or has("vocab.json", "merges.txt"):
        return transformers.AutoTokenizer.from_pretrained(folder, **source)
    places = [folder / "vocab.txt", folder.resolve().parent / "vocab.txt"]
    vocabulary = next((place for place in places if place.is_file()), None)
    if vocabulary is None or config.model_type != "bert":
        return None
    tokens = vocabulary.read_text(encoding="utf-8").splitlines()
    cased = any(token != token.lower() for token in tokens if not token.startswith("["))
    return transformers.BertTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, do_lower_case=not cased
    )
