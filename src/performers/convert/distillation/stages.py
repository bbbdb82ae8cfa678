"""Stages of distillation, with checkpoints and a history."""

import contextlib
import copy
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import transformers

from performers.app.files import write_json
from performers.app.processes import is_first_process
from performers.convert.fitting import evaluation
from performers.training.callbacks import (
    IntervalsCallback,
    ProgressCallback,
    RedrawCallback,
    StopCallback,
    stop_on_signals,
)
from performers.training.checkpoints import newest_checkpoint
from performers.training.parallel import (
    copy_whole_,
    keep_recorded_outputs_,
    keep_ties_together_,
    lost_processes,
)

_RECORD = "distillation.json"
_RESUME = "repeat the run with resume=True, which continues from the last checkpoint"


class _Loaded(Exception):
    """A stage is complete with the checkpoint that was loaded."""


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
        self._tokens: dict[str, int] = {}
        record = None if self.output_dir is None else self.output_dir / _RECORD
        if self.resume and record is not None and record.is_file():
            values = json.loads(record.read_text(encoding="utf-8"))
            # Tokens of each stage; checkpoints of records without them know of none.
            self._tokens = values.pop("stage_tokens", {"earlier": values["tokens"]})
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
            if "fsdp_config" in settings:
                # Nor gradients at the outputs of blocks, by which FSDP2 gathers them again.
                settings["fsdp_config"] = {**settings["fsdp_config"], "auto_wrap_policy": "NO_WRAP"}
        given = transformers.TrainingArguments(**settings)
        trained = model
        self._gather: Callable[[], None] = lambda: None
        if given.fsdp:
            # A copy is sharded, since FSDP2 cannot be undone.
            trained = copy.deepcopy(model)
            keep_ties_together_(trained)
            self._gather = functools.partial(copy_whole_, model, trained)
        stop = StopCallback()
        callbacks: list[Any] = [IntervalsCallback(), stop, self]
        if redraw_steps:
            callbacks.append(RedrawCallback(trained, redraw_steps, settings["seed"]))
        if (report := self.progress) is not None:
            callbacks.append(ProgressCallback(lambda *state: report(stage, *state)))
        trainer = trainer_class(
            model=trained,
            args=given,
            train_dataset=self.data,
            data_collator=self.collator,
            callbacks=callbacks,
            **arguments,
        )
        for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
        checkpoint, done = None, 0
        if self.resume and folder is not None and folder.is_dir():
            processes = trainer.args.world_size
            checkpoint = newest_checkpoint(folder, processes=processes)
        if checkpoint is not None:
            done = int(checkpoint.name.removeprefix("checkpoint-"))
        self._only_loads = done >= steps
        # Entries after the checkpoint are made again.
        self.result.history = [
            entry
            for entry in self.result.history
            if entry["stage"] != stage or entry["step"] <= done
        ]
        with stop_on_signals(stop), lost_processes(_RESUME):
            with contextlib.suppress(_Loaded):
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            reached = done if self._only_loads else trainer.state.global_step
            if reached < steps and not stop.requested:
                raise ValueError(
                    f"data ended after {reached} of {steps} steps of stage {stage!r}: pass a list, "
                    "or an iterable that can be iterated again"
                )
            self._count(stage, trainer.state)
            self._gather()
        self.result.finished = not stop.requested
        self.write()

    def write(self) -> None:
        """Update the seconds of the results, and write them to ``output``."""
        self.result.seconds = time.monotonic() - self._started
        if self.output_dir is not None and is_first_process():
            seconds = round(self.result.seconds, 2)
            values = asdict(self.result) | {"seconds": seconds, "stage_tokens": self._tokens}
            write_json(self.output_dir / _RECORD, values)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare a sharded model, or end where its checkpoint was all there was to do.

        Trainer would take one more step from the checkpoint of the last one.
        """
        if args.fsdp:
            keep_recorded_outputs_(kwargs["model"])
        if self._only_loads:
            raise _Loaded

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the tokens up to a checkpoint."""
        self._count(self._stage, state)
        self.write()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add a loss to the history."""
        if logs and "loss" in logs:
            self._keep(state.global_step, {"loss": float(logs["loss"])})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate when due."""
        every, last = self.eval_steps or state.max_steps, state.global_step == state.max_steps
        if self.evaluate is not None and (last or state.global_step % every == 0):
            self._gather()
            with evaluation(self.student):
                values = self.evaluate(self.student)
            self._keep(state.global_step, values)

    def _count(self, stage: str, state: Any) -> None:
        self._tokens[stage] = state.num_input_tokens_seen
        self.result.tokens = sum(self._tokens.values())

    def _keep(self, step: int, values: dict[str, float]) -> None:
        self.result.history.append({"stage": self._stage, "step": step, **values})
        self.write()
