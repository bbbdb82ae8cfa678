"""The best of the states of a model that a training run measures, kept in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_SCORE = "score"


def score(figures: Mapping[str, Any]) -> float:
    """Order figures of quality: by cosine for encoders, else by perplexity; higher is better."""
    value = float(figures["cosine"] if "cosine" in figures else -figures["perplexity"])
    return -math.inf if math.isnan(value) else value


class BestState:
    """Weights of the best measured state, and its score.

    Args:
        file: The file, which an earlier part of the run may have written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.score = -math.inf
        if file.is_file():
            with safe_open(file, "pt") as kept:
                self.score = float(kept.metadata()[_SCORE])

    def offer(self, model: Any, figures: Mapping[str, float]) -> None:
        """Keep the state of a model if it is better than the best so far."""
        if not (found := score(figures)) > self.score:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        staging = self.file.with_suffix(".part")
        save_file(_merged_state(model), staging, metadata={_SCORE: repr(found)})
        staging.replace(self.file)
        self.score = found

    def restore_(self, model: Any) -> None:
        """Give a model without adapters the best state."""
        model.load_state_dict(load_file(self.file))


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
