"""Models by their names on the Hugging Face Hub, and their cards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# Weights of other libraries, and exports.
_OTHER_FORMATS = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "onnx/*", "openvino/*", "coreml/*"]
# Entries of a card that hold for the converted model too.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def is_hub_name(name: str | Path) -> bool:
    """Return True for ``owner/name`` and ``name``; False for a path, which wins over the Hub."""
    return _NAME.fullmatch(str(name)) is not None and not Path(name).exists()


def model_folder(name: str | Path, argument: str) -> Path:
    """Find the folder of a model, in the cache of the Hub if ``name`` is no path.

    A model that the cache lacks is downloaded, unless ``HF_HUB_OFFLINE=1`` forbids it. Errors call
    the name ``argument``.

    Raises:
        FileNotFoundError: The Hub has no such model, cannot be reached, or is forbidden.
    """
    if not is_hub_name(name):
        return Path(name)
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(str(name), ignore_patterns=_OTHER_FORMATS))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        if huggingface_hub.is_offline_mode():
            reason = "it is not in the cache of the Hugging Face Hub, and HF_HUB_OFFLINE is set"
        raise FileNotFoundError(
            f"{argument} {name} is no folder, and the Hub cannot give such a model: {reason}; pass "
            f"the path of a folder, or run 'hf download {name}' with a network first"
        ) from error


def read_card(folder: Path) -> dict[str, Any]:
    """Read licence, language and task from the front matter of ``README.md``, if it has one."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        written = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {name: written[name] for name in _KEPT if isinstance(written.get(name), str | list)}
