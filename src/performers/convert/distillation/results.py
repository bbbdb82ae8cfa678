"""Results of a run of ``performers convert``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from performers.app.conversion import ConversionOptions

__all__ = [
    "BASELINE",
    "FINE_TUNED",
    "ORIGINAL",
    "ZERO_SHOT",
    "ConversionRecord",
]

ORIGINAL, BASELINE = "original", "FAVOR+ alone"
ZERO_SHOT, FINE_TUNED = "converted", "converted, fine-tuned"
"""What is measured; the baseline has as many features, no exact terms and no calibration."""


@dataclass
class ConversionRecord:
    """Results so far, as plain values.

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
        # The name of the option in earlier runs.
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
        for item in fields(self)[:-1]:
            setattr(self, item.name, content[item.name])

    def row(self, name: str) -> dict[str, Any] | None:
        """What was measured of a model, if it was."""
        return next((row for row in self.quality if row["model"] == name), None)
