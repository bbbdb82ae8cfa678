"""Results of a run of ``performers convert``: the record, and the best state of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from performers.app.conversion import ConversionOptions
from performers.app.files import replacement
from performers.app.provenance import write_result

ORIGINAL, BASELINE = "original", "FAVOR+ alone"
ZERO_SHOT, FINE_TUNED = "converted", "converted, fine-tuned"
"""Models that are measured; the baseline has as many features, no exact terms, no calibration."""


@dataclass
class ConversionRecord:
    """Results of a run so far, as plain values.

    Attributes:
        options: Options of the run, defaults included.
        model: ``class``, ``kind``, ``parameters``, ``tested_examples``, ``trained_positions``,
            ``positions``, ``is_sentence_model``, ``is_hub_name``, and entries of the original's
            ``card``.
        quality: A row for each measured model: ``model``, ``tokens`` and the figures.
        training: ``history``, ``tokens`` and ``seconds`` of `distill`, and the ``saved`` stage and
            step; empty without it.
        speed: Rows of ``benchmark.cases.convert.measure_speed``.
        decoding: Rows of ``benchmark.cases.convert.measure_decoding``.
        machine: Description of the machine.
        is_saved: Whether the folder holds the model.
        source: Folder, or GGUF file, of the original's transformer; no part of the content.
        file: File of the content.
    """

    file: Path
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    quality: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    speed: list[dict[str, Any]] = field(default_factory=list)
    decoding: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    is_saved: bool = False
    source: Path | None = None

    def content(self) -> dict[str, Any]:
        """Results as a JSON object."""
        return {x: value for x, value in vars(self).items() if x not in ("source", "file")}

    def save(self) -> None:
        """Write the results to the file, with the origin of the run."""
        seed = self.options["seed"]
        write_result(self.file, self.content(), "conversion", seed=seed, model=self.source)

    def resume(self, content: Mapping[str, Any]) -> None:
        """Adopt the results of an earlier run with the same options."""
        if missing := [name for name in self.content() if name not in content]:
            raise ValueError(f"the record in the folder lacks {', '.join(missing)}")
        # Runs of versions without an option used its default; those without the hash of the weights
        # pass. key_list is the name of an option in earlier versions.
        earlier = {x.name: x.default for x in fields(ConversionOptions) if x.default is not MISSING}
        earlier |= {"model_sha256": self.options["model_sha256"], **content["options"]}
        earlier["listed_keys"] = earlier.pop("key_list", earlier["listed_keys"])
        changed = [
            f"{name} was {earlier.get(name)}, now {value}"
            for name, value in self.options.items()
            if earlier.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"the run in the folder is another one: {'; '.join(changed)}; repeat its options, "
                "or give another folder"
            )
        # The options and the description of the model are this run's: versions differ in them.
        kept = self.content().keys() - {"options", "model"}
        vars(self).update({name: content[name] for name in kept})

    def row(self, name: str) -> dict[str, Any] | None:
        """Row of a measured model, or None."""
        return next((row for row in self.quality if row["model"] == name), None)


def score(figures: Mapping[str, Any]) -> float:
    """Order figures of quality: by cosine for encoders, else by perplexity; higher is better."""
    value = float(figures["cosine"] if "cosine" in figures else -figures["perplexity"])
    return -math.inf if math.isnan(value) else value


class BestState:
    """Weights of the best measured state in a file, which an earlier part of the run may have."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.score = -math.inf
        if file.is_file():
            with safe_open(file, "pt") as kept:
                self.score = float(kept.metadata()["score"])

    def offer(self, model: Any, figures: Mapping[str, float]) -> None:
        """Keep the state of a model if it is better than the best so far."""
        if not (found := score(figures)) > self.score:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacement(self.file) as staging:
            save_file(_merged_state(model), staging, metadata={"score": repr(found)})
        self.score = found


@torch.no_grad()
def _merged_state(model: Any) -> dict[str, Tensor]:
    """The state of a model, adapters of peft merged into the weights that they adapt."""
    deltas = {
        f"{name}.weight": module.get_delta_weight(adapter)
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
        for adapter in module.active_adapters
    }
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        # Tied weights are copied: a file has no shared ones.
        state[name] = tensor.cpu().clone().contiguous()
        if name in deltas:
            state[name] += deltas[name].cpu()
    return state
