"""Contestants: an attention and how rows are cut, each trained for one time and read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import studies.comparators  # noqa: F401  (registers attentions)
from performers.cli.console import note
from performers.models import PerformerForCausalLM
from performers.streams.evaluation import PLACES, evaluate_texts
from performers.streams.subwords import byte_tokenizer
from performers.streams.text import Texts, read_bytes
from performers.streams.training import train_texts
from performers.training.options import TrainingOptions
from studies.pages import ABSENT, Table
from studies.parts import Measures, Part
from studies.text.redraw import REDRAWS, Schedule, measure_draws, redraw_tables
from studies.training import look_back_

if TYPE_CHECKING:
    from studies.text.__main__ import TextOptions

CONTEXT = 8192
MODEL: dict[str, Any] = {
    "objective": "clm",
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_features": 64,
    "batch_tokens": CONTEXT,
    "max_length": CONTEXT,
    "dropout": 0.0,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    "warmup_steps": 10,
    "redraw_steps": 0,
    "validation_fraction": 0.0,
    # The time ends a run.
    "steps": 100_000,
    "save_steps": 25,
    "eval_steps": 100_000,
    "device": "cpu",
}
"""Options of all models; a step is of 8,192 bytes for each."""

START: dict[str, Any] = {"learning_rate": 4e-3, "look_back": [1, 2]}
"""Start of all contestants: heads of a layer prefer the byte before, and the one before that."""

SHORT: dict[str, Any] = {
    "max_length": 256,
    "batch_tokens": 2048,
    "learning_rate": 4e-3,
    "warmup_steps": 20,
    "carry_state": False,
    "memory": None,
}
"""Options of trainings on short rows."""

SHORT_SHARE = 0.3
"""Share of the time that goes to short rows where a training on long rows begins with them."""


@dataclass(frozen=True)
class Contestant:
    """An attention and its training."""

    name: str
    title: str
    # Options of training that differ from `MODEL`.
    changes: Mapping[str, Any]
    # `SHORT_SHARE` of the time goes to short rows, before the long ones.
    short: bool = False


CONTESTANTS = (
    Contestant("softmax", "Performer-softmax, window 64", {"window": 64}),
    Contestant("exact", "exact", {"attention": "exact"}),
    Contestant("softmax_short", "Performer-softmax, window 64, short first", {"window": 64}, True),
    Contestant("exact_short", "exact, short first", {"attention": "exact"}, True),
    Contestant("relu", "Performer-ReLU", {"attention": "favor-relu"}),
    Contestant(
        "carried",
        "Performer-softmax, window 64, segments of 1,024, state carried",
        {"window": 64, "max_length": 1024, "carry_state": True},
    ),
    Contestant("exact_512", "exact", {"attention": "exact", "max_length": 512}),
    Contestant(
        "memory",
        "exact, memory of 512 keys (Transformer-XL)",
        {"attention": "exact", "max_length": 512, "carry_state": True, "memory": 512},
    ),
    Contestant(
        "lsh",
        "Reformer",
        {"attention": "lsh", "attention_options": {"buckets": 128, "chunk_size": 64, "rounds": 2}},
    ),
    Contestant(
        "sparse",
        "Sparse Transformer, strided",
        {"attention": "sparse", "attention_options": {"stride": 128}},
    ),
)


@dataclass(frozen=True)
class Study:
    """The study: its options and its texts; models go to ``models`` below the output folder."""

    options: TextOptions
    novels: list[Path]
    unseen: list[Path]

    def settings(self) -> dict[str, Any]:
        """Numbers that the results depend on."""
        texts = {
            name: [len(files), sum(file.stat().st_size for file in files)]
            for name, files in (("novels", self.novels), ("unseen", self.unseen))
        }
        return {**texts, **self.options.settings(), "model": MODEL, "start": START}

    def parts(self) -> Measures:
        """Measurements by their names."""
        found: Measures = {x.name: partial(self._compete, x) for x in CONTESTANTS}
        for name, schedule in REDRAWS.items():
            found[name] = partial(self._redraw, name, schedule)
        return found

    def _folder(self, name: str) -> Path:
        return self.options.output_folder / "models" / name

    def _train(
        self, name: str, seconds: float, changes: Mapping[str, Any], start: str | None = None
    ) -> tuple[PerformerForCausalLM, dict[str, Any], TrainingOptions]:
        given = {"seed": self.options.seed, "time_limit": seconds}
        options = TrainingOptions(**{**MODEL, **given, **changes})
        output = self._folder(name)
        output.mkdir(parents=True, exist_ok=True)

        def progress(step: int, steps: int, log: dict[str, float]) -> None:
            if "loss" in log:
                note(f"{name}: step {step}, loss {log['loss']:.3f}")

        result = train_texts(
            self.novels,
            output,
            options,
            start=None if start is None else self._folder(start),
            resume=(output / "training.json").exists(),
            progress=progress,
            announce=note,
        )
        return PerformerForCausalLM.from_pretrained(output), result, options

    def _begin(self, name: str, changes: Mapping[str, Any]) -> None:
        """Save a model that is not trained yet, whose heads look back."""
        options = TrainingOptions(**{**MODEL, **changes})
        torch.manual_seed(self.options.seed)
        model = PerformerForCausalLM(options.model_config(byte_tokenizer(options.max_length)))
        look_back_(model, START["look_back"])
        model.save_pretrained(self._folder(name))

    def _read(self, model: Any, options: TrainingOptions, **changes: Any) -> dict[str, Any]:
        shape = {
            "length": options.max_length,
            "context": CONTEXT,
            "carry": options.carry_state,
            "tokens_at_most": self.options.contexts * CONTEXT,
            "rows": 1,
        }
        return evaluate_texts(model, self._austen(), **{**shape, **changes})

    def _austen(self) -> Texts:
        return read_bytes(self.unseen, note)

    def _compete(self, contestant: Contestant) -> Part:
        changes = {"learning_rate": START["learning_rate"], **contestant.changes}
        name, seconds, start = contestant.name, self.options.seconds, f"{contestant.name}-start"
        self._begin(start, changes)
        short_steps, short_seconds = None, 0.0
        if contestant.short:
            seconds, begun, start = (1 - SHORT_SHARE) * seconds, start, f"{name}-short"
            short = {**changes, **SHORT}
            _, first, _ = self._train(start, SHORT_SHARE * self.options.seconds, short, begun)
            short_steps, short_seconds = first["steps"], first["processor_seconds"]
        model, result, options = self._train(name, seconds, changes, start)
        found = self._read(model, options)
        part = {
            "title": contestant.title,
            "length": options.max_length,
            "short_steps": short_steps,
            "steps": result["steps"],
            "processor_seconds": short_seconds + result["processor_seconds"],
            "parameters": result["parameters"],
            "tokens": found["tokens"],
            "bits_per_byte": found["bits_per_byte"],
            "places": found["places"],
        }
        if options.carry_state:
            alone = self._read(model, options, carry=False)
            part["bits_per_byte_without_past"] = alone["bits_per_byte"]
        return part

    def _redraw(self, name: str, schedule: Schedule) -> Part:
        changes: dict[str, Any] = {"redraw_steps": schedule.steps}
        if schedule.long:
            half = self.options.redraw_seconds / 2
            self._train("plain-short", SHORT_SHARE * half, SHORT)
            time, start = (1 - SHORT_SHARE) * half, "plain-short"
        else:
            changes |= SHORT
            time, start = self.options.redraw_seconds, None
        model, result, options = self._train(name, time, changes, start)
        read = partial(
            self._read, model, options, tokens_at_most=self.options.contexts * CONTEXT // 4
        )
        length = options.max_length
        found = measure_draws(model, self._austen(), lambda: read()["bits_per_byte"], length)
        return {"length": length, "steps": result["steps"], **found}


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """Bits per byte, by place in the context, and of the redraws."""
    found = redraw_tables(parts)
    done = [parts[entry.name] for entry in CONTESTANTS if entry.name in parts]
    done.sort(key=lambda part: part["bits_per_byte"])
    if not done:
        return found
    rows, by_place = [], []
    width = CONTEXT // PLACES
    for part in done:
        names = {"attention": part["title"], "segment": f"{part['length']:,}"}
        without, short = part.get("bits_per_byte_without_past"), part["short_steps"]
        rows.append(
            {
                **names,
                "short steps": ABSENT if short is None else f"{short:,}",
                "steps": f"{part['steps']:,}",
                "bits per byte": f"{part['bits_per_byte']:.3f}",
                "to the best": f"{part['bits_per_byte'] - done[0]['bits_per_byte']:+.3f}",
                "without past": ABSENT if without is None else f"{without:.3f}",
            }
        )
        # Texts may end before.
        bits = {place["start"]: f"{place['bits_per_byte']:.3f}" for place in part["places"]}
        starts = [width * place for place in (0, 1, 2, 4, 8, 12, 15)]
        by_place.append(names | {f"{x:,}–{x + width:,}": bits.get(x, ABSENT) for x in starts})
    return found | {"bits": Table.of(rows), "places": Table.of(by_place, names=2)}
