"""A pretrained model with passages to fit to, and others to measure on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from performers.benchmark.settings import PretrainedSettings
from performers.convert.distillation.pretrained import LoadedModel, load_model
from performers.convert.distillation.texts import text_windows
from performers.nn import Approximation

# Layers from which not all are taken by default, and the step.
_MANY_LAYERS, _STEP = 8, 5


@dataclass(frozen=True)
class Pretrained:
    """What the settings name, read.

    Attributes:
        settings: The settings.
        loaded: The model, with its language-modelling head where it has one.
        calibration: Token ids of the passages to fit to, (passages, length).
        test: Those of the passages to measure on.
    """

    settings: PretrainedSettings
    loaded: LoadedModel
    calibration: Tensor
    test: Tensor

    @property
    def approximation(self) -> Approximation:
        """All exact terms of the settings; sinks are for causal models."""
        settings = self.settings
        return Approximation(
            settings.num_features,
            window=settings.window,
            sinks=settings.sinks if self.loaded.is_causal else 0,
            listed_keys=settings.keys,
        )

    def chosen_layers(self, there: list[int]) -> list[int]:
        """The layers whose heads are measured.

        Args:
            there: Those of the model.

        Returns:
            The ones that were asked for, or the default ones.

        Raises:
            ValueError: One that was asked for is not there.
        """
        wanted = self.settings.layers
        if not wanted:
            return there if len(there) <= _MANY_LAYERS else sorted({*there[::_STEP], there[-1]})
        if not set(wanted) <= set(there):
            raise ValueError(
                f"layers must be some of the model's {there[0]} to {there[-1]}, got {list(wanted)}"
            )
        return sorted(set(wanted))


def read_pretrained(settings: PretrainedSettings) -> Pretrained:
    """Load the model and cut the texts into passages.

    Args:
        settings: What to read.

    Returns:
        The model and the passages.

    Raises:
        FileNotFoundError: The model or a text is not there.
        ImportError: The model is a GGUF file, and the package gguf is not installed.
        ValueError: The model cannot be read, or a text is too short or does not suit it.
    """
    loaded = load_model(settings.model, head=None)
    limit = loaded.max_length
    if limit is not None and settings.length > limit:
        raise ValueError(
            f"length must be at most {limit}, the positions that {settings.model} has, got "
            f"{settings.length}"
        )
    if loaded.tokenizer is None:
        raise ValueError(f"model {settings.model} has no tokenizer files")
    fitted, length = settings.calibration_passages, settings.length
    source = settings.calibration or settings.text
    skip = fitted if settings.calibration is None else 0
    calibration = text_windows(loaded.tokenizer, source, length, fitted)
    test = text_windows(loaded.tokenizer, settings.text, length, settings.passages, skip=skip)
    return Pretrained(settings, loaded, calibration, test)
