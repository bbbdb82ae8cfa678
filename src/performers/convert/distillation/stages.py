"""Stages of distillation, with checkpoints and a history."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import transformers

from performers.convert.fitting import evaluation
from performers.training.callbacks import (
    IntervalsCallback,
    ProgressCallback,
    RedrawCallback,
    StopCallback,
    stop_on_signals,
)
from performers.training.checkpoints import newest_checkpoint

_RECORD = "distillation.json"


@dataclass
class Distillation:
    """Results of `distill`.

    Attributes:
        history: A record for each log entry and evaluation: ``stage`` (``"transfer"`` or
            ``"model"``), ``step`` within the stage, and ``loss`` or the figures of ``evaluate``.
        tokens: Number of tokens that this process trained on (rows, where inputs have no mask).
        seconds: Wall-clock time, with evaluations and the parts before a ``resume``.
        finished: False if a signal stopped the run, which ``resume`` continues.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = True


@dataclass(eq=False)
class DistillationRun(transformers.TrainerCallback):
    """A run of two stages.

    Attributes are the arguments of `distill`, and ``arguments`` those of
    ``transformers.TrainingArguments`` that both stages share.
    """

    student: Any
    data: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    output_dir: Path | None
    arguments: dict[str, Any]
    eval_steps: int | None
    evaluate: Callable[[Any], dict[str, float]] | None
    progress: Callable[[str, int, int, dict[str, float]], None] | None
    resume: bool
    result: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        record = None if self.output_dir is None else self.output_dir / _RECORD
        if self.resume and record is not None and record.is_file():
            values = json.loads(record.read_text(encoding="utf-8"))
            self.result = Distillation(**{**values, "finished": True})
        self._started = time.monotonic() - self.result.seconds

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
        """Train the student, with adapters or without, in one stage, or resume the stage.

        ``arguments`` are those of the trainer.
        """
        self._stage = stage
        folder = None if self.output_dir is None else self.output_dir / stage
        settings: dict[str, Any] = {
            "output_dir": str(folder or "unused"),
            "save_strategy": "no" if folder is None else "steps",
            "save_total_limit": 2,
            "max_steps": steps,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": math.ceil(0.05 * steps) if stage == "model" else 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "adam_beta2": 0.98,
            "report_to": [],
            "remove_unused_columns": False,
            "disable_tqdm": True,
            **self.arguments,
        }
        if stage == "transfer":
            # Gradients stay within a layer: there are no activations to compute again.
            for name in ("gradient_checkpointing", "activation_checkpointing"):
                settings.pop(name, None)
        stop = StopCallback()
        callbacks: list[Any] = [IntervalsCallback(), stop, self]
        if redraw_steps:
            callbacks.append(RedrawCallback(model, redraw_steps, settings["seed"]))
        if (report := self.progress) is not None:
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
        checkpoint, done = None, 0
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if self.resume and folder is not None and folder.is_dir():
            processes = trainer.args.world_size
            checkpoint = newest_checkpoint(folder, processes=processes, sharded=sharded)
        if checkpoint is not None:
            done = int(checkpoint.name.removeprefix("checkpoint-"))
        # Entries after the checkpoint are made again.
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
                        f"{stage!r}: pass a list, or an iterable that can be iterated again"
                    )
        self.result.tokens += trainer.tokens
        self.result.finished = not stop.requested
        self.write()

    def write(self) -> None:
        """Update the seconds of the results, and write them to ``output``."""
        self.result.seconds = time.monotonic() - self._started
        if self.output_dir is None or int(os.environ.get("RANK", "0")):
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        values = {**asdict(self.result), "seconds": round(self.result.seconds, 2)}
        part = self.output_dir / f"{_RECORD}.part"
        part.write_text(json.dumps(values, indent=1), encoding="utf-8")
        part.replace(self.output_dir / _RECORD)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add a loss to the history."""
        if logs and "loss" in logs:
            self._keep(state.global_step, {"loss": float(logs["loss"])})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate when due."""
        every, last = self.eval_steps or state.max_steps, state.global_step == state.max_steps
        if self.evaluate is not None and (last or state.global_step % every == 0):
            with evaluation(self.student):
                values = self.evaluate(self.student)
            self._keep(state.global_step, values)

    def _keep(self, step: int, values: dict[str, float]) -> None:
        self.result.history.append({"stage": self._stage, "step": step, **values})
        self.write()
