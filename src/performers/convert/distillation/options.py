"""What a run of ``performers convert`` is asked to do, and what it has found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from performers.convert.conversion import Conversion
from performers.features.softmax import Estimator

__all__ = [
    "BASELINE",
    "FINE_TUNED",
    "ORIGINAL",
    "ZERO_SHOT",
    "ConversionOptions",
    "ConversionRecord",
]

ORIGINAL, BASELINE = "original", "FAVOR+ alone"
ZERO_SHOT, FINE_TUNED = "converted", "converted, fine-tuned"
"""What is measured; the baseline has as many features, no exact terms and no calibration."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What a run is asked to do; each is a flag of ``performers convert``.

    Attributes:
        model: Folder of a pretrained transformers model, or a ``.gguf`` file.
        data: Text or FASTA file to calibrate, train and test on.
        window, sinks, key_list, num_features, estimator, layers: As in `to_performer`; ``sinks``
            None: 4 for decoders, 0 for encoders.
        length: Tokens in an example; None: 1,024 for decoders and 512 for encoders, or fewer if
            the model has fewer positions.
        calibration: Examples to calibrate on.
        test: Examples to test on, or their share of the file.
        transfer_steps, steps, batch_size, accumulation, learning_rate, transfer_learning_rate,
            lora_rank, redraw_steps, loss, hidden_weight: As in `distill`; ``transfer_steps`` None:
            100, and 0 for models of ``performers.models``; ``loss`` None: ``"logits"``, and
            ``"embedding"`` for models without a head.
        eval_steps: Steps between measurements; None: a fifth of a stage's steps.
        save_steps: Steps between checkpoints.
        max_positions: Give a model with a learned table of positions that many.
        seed: Random seed.
    """

    model: str
    data: str
    window: int | None = 64
    sinks: int | None = None
    key_list: int = 0
    num_features: int | None = None
    estimator: Estimator = "data_aware"
    layers: tuple[int, ...] | None = None
    length: int | None = None
    calibration: int = 16
    test: int | float = 32
    transfer_steps: int | None = None
    steps: int = 200
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 5e-5
    transfer_learning_rate: float = 1e-2
    lora_rank: int | None = None
    redraw_steps: int | None = None
    loss: str | None = None
    hidden_weight: float = 1.0
    eval_steps: int | None = None
    save_steps: int = 50
    max_positions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        least = {
            "num_features": 1,
            "length": 3,
            "calibration": 1,
            "transfer_steps": 0,
            "steps": 0,
            "batch_size": 1,
            "accumulation": 1,
            "lora_rank": 1,
            "redraw_steps": 1,
            "eval_steps": 1,
            "save_steps": 1,
            "max_positions": 1,
            "seed": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        for name in ("learning_rate", "transfer_learning_rate", "hidden_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        Conversion(
            window=self.window,
            sinks=self.sinks or 0,
            key_list=self.key_list,
            layers=self.layers,
            estimator=self.estimator,
        ).features(8, 1)


@dataclass
class ConversionRecord:
    """What a run has found so far, as plain values.

    Attributes:
        options: Of the run, with what they stand for where they were left open.
        model: ``class``, ``kind``, ``parameters``, ``tested_examples``.
        quality: A mapping for each of what was measured: ``model``, ``tokens`` and the figures.
        training: ``history``, ``tokens`` and ``seconds`` of `distill`; empty without it.
        speed: Rows of ``benchmark.converted.measure_speed``.
        decoding: Rows of ``benchmark.converted_decode.measure_decoding``.
        machine: What it was measured on.
        is_saved: Whether the folder holds the model.
        saved: Called when something was added.
    """

    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    quality: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    speed: list[dict[str, Any]] = field(default_factory=list)
    decoding: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    is_saved: bool = False
    saved: Callable[[ConversionRecord], None] = lambda record: None

    def content(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)[:-1]}

    def resume(self, content: Mapping[str, Any]) -> None:
        """Take over what an earlier run found."""
        missing = [item.name for item in fields(self)[:-1] if item.name not in content]
        if missing:
            raise ValueError(f"the record in the folder lacks {', '.join(missing)}")
        # A run that is older than an option had its default.
        earlier = {
            item.name: item.default
            for item in fields(ConversionOptions)
            if item.default is not MISSING
        }
        earlier |= content["options"]
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
        for item in fields(self)[:-1]:
            setattr(self, item.name, content[item.name])

    def row(self, name: str) -> dict[str, Any] | None:
        """What was measured of a model, if it was."""
        return next((row for row in self.quality if row["model"] == name), None)
