"""Results of a run of ``performers convert``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from performers.app.conversion import ConversionOptions

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
        saved: Called after each addition.
    """

    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    quality: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    speed: list[dict[str, Any]] = field(default_factory=list)
    decoding: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    is_saved: bool = False
    source: Path | None = None
    saved: Callable[[ConversionRecord], None] = lambda record: None

    def content(self) -> dict[str, Any]:
        """Results as a JSON object."""
        return {x: value for x, value in vars(self).items() if x not in ("source", "saved")}

    def resume(self, content: Mapping[str, Any]) -> None:
        """Adopt the results of an earlier run with the same options."""
        if missing := [name for name in self.content() if name not in content]:
            raise ValueError(f"the record in the folder lacks {', '.join(missing)}")
        # Runs of versions without an option used its default.
        defaults = {
            x.name: x.default for x in fields(ConversionOptions) if x.default is not MISSING
        }
        # Records of versions without the hash of the weights pass.
        defaults["model_sha256"] = self.options["model_sha256"]
        earlier = defaults | content["options"]
        # key_list is the name of the option in earlier versions.
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
