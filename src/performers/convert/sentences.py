"""Models of sentence-transformers: the transformer inside, and the files of the other modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_MODULES, _LIBRARY = "modules.json", "sentence_transformers"


def transformer_of(model: Any) -> Any:
    """Return the transformers model in a model of sentence-transformers, or the model itself.

    Raises:
        ValueError: The model of sentence-transformers has no transformer, or several.
    """
    # By name: the package need not be installed.
    if all(x.__module__.partition(".")[0] != _LIBRARY for x in type(model).__mro__):
        return model
    from transformers import PreTrainedModel

    inside = [x for x in model.modules() if isinstance(x, PreTrainedModel)]
    parts = {part for x in inside for part in x.modules() if part is not x}
    outermost = [x for x in inside if x not in parts]
    if len(outermost) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(outermost)} transformers models inside, expected "
            "one: convert each with to_performer"
        )
    return outermost[0]


def pad_inputs_(model: Any) -> None:
    """Make a model of sentence-transformers pad its batches.

    With flash attention it lays texts in one row, for a mask that its kernels alone understand.
    """
    for module in model.modules():
        if getattr(module, "can_flatten_inputs", False):
            module.unpad_inputs = False


def tokenized(model: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """Replace batches of texts by the inputs of the transformer that ``model.encode`` makes.

    They begin with the default prompt of the model and are cut at its ``max_seq_length``.
    """
    prompt = model.prompts.get(model.default_prompt_name) or ""
    limit = model.max_seq_length
    if limit is not None:
        # No limit is a number that tokenizers cannot represent.
        limit = min(limit, 2**31 - 1)
    for batch in batches:
        texts = [batch] if isinstance(batch, str) else batch
        if not isinstance(texts, Mapping) and all(isinstance(text, str) for text in texts):
            batch = dict(
                model.tokenizer(
                    [prompt + text for text in texts],
                    padding=True,
                    truncation=True,
                    max_length=limit,
                    return_tensors="pt",
                )
            )
        yield batch


class SentenceFiles:
    """Files of a saved model of sentence-transformers that are not those of its transformer.

    Raises:
        ValueError: A module lies outside of the folder, or none is a transformer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules = json.loads((folder / _MODULES).read_text(encoding="utf-8"))
        paths = [(folder / module["path"]).resolve() for module in self.modules]
        if not all(path.is_relative_to(folder.resolve()) for path in paths):
            raise ValueError(f"{folder / _MODULES} names a folder outside of {folder}")
        kinds = [module["type"].rpartition(".")[2] for module in self.modules]
        if kinds.count("Transformer") != 1:
            raise ValueError(
                f"{folder} is a model of sentence-transformers with the modules "
                f"{', '.join(kinds)}: expected one Transformer among them"
            )
        self._index = kinds.index("Transformer")
        self.transformer = folder / self.modules[self._index]["path"]
        """Folder of the transformer."""
        configs = sorted(self.transformer.glob("sentence_*_config.json"))
        self.config: dict[str, Any] = {}
        """Settings of the texts, with ``max_seq_length``, in tokens, where it is set."""
        if configs:
            self.config = json.loads(configs[0].read_text(encoding="utf-8"))

    @classmethod
    def of(cls, folder: Path) -> SentenceFiles | None:
        """Read the files of a folder; None if it is not one of sentence-transformers."""
        return cls(folder) if (folder / _MODULES).is_file() else None

    def save_pretrained(self, folder: Path) -> None:
        """Write the files beside a transformer at the top of a folder."""
        modules = [dict(module) for module in self.modules]
        modules[self._index]["path"] = ""
        for path in filter(None, (module["path"] for module in modules)):
            # Modules without parameters may have no folder.
            if (self.folder / path).is_dir():
                shutil.copytree(self.folder / path, folder / path)
        about = self.folder / "config_sentence_transformers.json"
        if about.is_file():
            shutil.copy(about, folder)
        contents = {_MODULES: modules, "sentence_bert_config.json": self.config}
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
