"""One stage of distillation after another, with checkpoints and a history."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import IterableDataset

from performers.training.callbacks import (
    IntervalsCallback,
    ProgressCallback,
    RedrawCallback,
    StopCallback,
    stop_on_signals,
)
from performers.training.checkpoints import newest_checkpoint

__all__ = ["Distillation", "DistillationRun"]

_DONE = "distillation.json"


@dataclass
class Distillation:
    """What `distill` did.

    Attributes:
        history: A record for each log entry and evaluation: ``stage`` (``"transfer"`` or
            ``"model"``), ``step`` within the stage, and ``loss`` or what ``evaluate`` returned.
        tokens: Tokens that were trained on by this process (rows, where inputs have no mask).
        seconds: Wall-clock time, evaluations and the parts before a ``resume`` included.
        finished: False when a signal stopped the run, which ``resume`` continues.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = True


@dataclass
class DistillationRun:
    """What both stages share."""

    student: Any
    data: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    output: Path | None
    batch_size: int
    accumulation: int
    save_steps: int
    log_steps: int
    eval_steps: int | None
    evaluate: Callable[[Any], dict[str, float]] | None
    resume: bool
    seed: int
    progress: Callable[[str, int, int, dict[str, float]], None] | None
    options: dict[str, Any]
    result: Distillation = field(default_factory=Distillation)
    started: float = field(default_factory=time.monotonic)
    earlier: float = 0.0

    def train(
        self,
        trainer_class: Any,
        model: Any,
        stage: str,
        steps: int,
        learning_rate: float,
        *,
        redraw_steps: int | None = None,
        **arguments: Any,
    ) -> None:
        """One stage."""
        folder = None if self.output is None else self.output / stage
        settings: dict[str, Any] = {
            "output_dir": str(folder or "unused"),
            "save_strategy": "no" if folder is None else "steps",
            "save_steps": self.save_steps,
            "save_total_limit": 2,
            "logging_steps": self.log_steps,
            "max_steps": steps,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": math.ceil(0.05 * steps) if stage == "model" else 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "adam_beta2": 0.98,
            "seed": self.seed,
            "report_to": [],
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "dataloader_drop_last": not isinstance(self.data, IterableDataset),
            **self.options,
        }
        stop = StopCallback()
        callbacks: list[Any] = [IntervalsCallback(), stop, _History(self, stage)]
        if redraw_steps:
            callbacks.append(RedrawCallback(model, redraw_steps, self.seed))
        if self.progress is not None:
            report = self.progress
            callbacks.append(ProgressCallback(lambda *state: report(stage, *state)))
        trainer = trainer_class(
            model=model,
            args=transformers.TrainingArguments(**settings),
            train_dataset=self.data,
            data_collator=self.collator,
            callbacks=callbacks,
            **arguments,
        )
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        checkpoint = None
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if self.resume and folder is not None and folder.is_dir():
            checkpoint = newest_checkpoint(
                folder, processes=trainer.args.world_size, sharded=sharded
            )
        done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
        # What came after the checkpoint comes again.
        self.result.history = [
            entry
            for entry in self.result.history
            if entry["stage"] != stage or entry["step"] <= done
        ]
        with stop_on_signals(stop):
            if checkpoint is not None and done >= steps and not sharded:
                # Trainer would take one more step from the checkpoint of the last one.
                trainer._load_from_checkpoint(str(checkpoint))
            else:
                resumed = None if checkpoint is None else str(checkpoint)
                trainer.train(resume_from_checkpoint=resumed)
                if trainer.state.global_step < steps and not stop.requested:
                    raise ValueError(
                        f"data ended after {trainer.state.global_step} of {steps} steps of stage "
                        f"{stage!r}: pass a list, or an iterable that can be begun again"
                    )
        self.result.tokens += trainer.tokens
        self.result.finished = not stop.requested
        self.write()

    def keep(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Add to the history, also to that in ``output``."""
        self.result.history.append({"stage": stage, "step": step, **values})
        self.write()

    def write(self) -> None:
        """Write what was done so far to ``output``."""
        if self.output is None or int(os.environ.get("RANK", "0")):
            return
        self.output.mkdir(parents=True, exist_ok=True)
        spent = self.earlier + time.monotonic() - self.started
        values = {**asdict(self.result), "seconds": round(spent, 2)}
        part = self.output / f"{_DONE}.part"
        part.write_text(json.dumps(values, indent=1), encoding="utf-8")
        part.replace(self.output / _DONE)

    def read(self) -> None:
        """Take up what an interrupted run wrote."""
        if self.output is None or not (self.output / _DONE).is_file():
            return
        values = json.loads((self.output / _DONE).read_text(encoding="utf-8"))
        self.result = Distillation(**{**values, "finished": True})
        self.earlier = self.result.seconds


class _History(transformers.TrainerCallback):
    """Keeps losses and evaluations."""

    def __init__(self, run: DistillationRun, stage: str) -> None:
        self.run, self.stage = run, stage

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep a loss."""
        if logs and "loss" in logs:
            self.run.keep(self.stage, state.global_step, {"loss": float(logs["loss"])})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate when due."""
        every = self.run.eval_steps or state.max_steps
        last = state.global_step == state.max_steps
        if self.run.evaluate is None or (state.global_step % every and not last):
            return
        model = self.run.student
        training = model.training
        model.eval()
        with torch.no_grad():
            self.run.keep(self.stage, state.global_step, self.run.evaluate(model))
        model.train(training)
