"""A training run in a folder: begun or resumed, stopped by signals, saved when it has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from performers.app.errors import Interrupted, UserError
from performers.app.files import read_json
from performers.app.processes import is_first_process, process_count
from performers.app.provenance import write_result
from performers.models.manifest import save_model_folder
from performers.training.arguments import tracker_callbacks, training_arguments
from performers.training.callbacks import (
    ClockCallback,
    EstimateCallback,
    IntervalsCallback,
    ProgressCallback,
    RedrawCallback,
    StopCallback,
    TimeLimitCallback,
    TrimCallback,
    stop_on_signals,
)
from performers.training.checkpoints import newest_checkpoint
from performers.training.environment import quiet_transformers
from performers.training.options import TrainingOptions
from performers.training.parallel import lost_processes
from performers.training.trainer import RunTrainer

ReportStep = Callable[[int, int, dict[str, float]], None]
"""Called with the step, the steps in all and the latest log entry."""


class TrainingRun:
    """A run in a folder, checked against the one that the folder holds.

    Args:
        output: Folder of the run.
        data: Data of the run, for its record, with a ``sha256``.
        options: Options of the run.
        resume: Continue from the newest checkpoint in ``output`` that is complete and undamaged;
            from the start if the saving of none had ended.
        before: Names in ``output`` that are written before a run begins.
        initial_model: Name and ``sha256`` of the model that the run begins with, if any; no hash
            of one that is no longer there.

    Raises:
        UserError: The folder holds another run or something else, all checkpoints are damaged, or
            the device or the package of a tracker is missing.
    """

    def __init__(
        self,
        output: Path,
        data: dict[str, Any],
        options: TrainingOptions,
        *,
        resume: bool,
        before: Collection[str] = (),
        initial_model: dict[str, Any] | None = None,
    ) -> None:
        self.output, self.options = output, options
        self.record = {"options": options.to_dict(), "data": data, "processes": process_count()}
        if initial_model is not None:
            self.record["initial_model"] = initial_model
        checkpoints = output / "checkpoints"
        self.checkpoint: Path | None = None
        self._settings = output / "training.json"
        self._continued = resume and self._settings.exists()
        if self._continued:
            earlier = check_same_run(self._settings, self.record, options)
            self.record |= {x: earlier[x] for x in ("initial_model",) if x in earlier}
            try:
                self.checkpoint = newest_checkpoint(checkpoints, processes=process_count())
            except ValueError as error:
                raise UserError(f"--resume: {error}") from error
        elif resume and is_first_process() and {x.name for x in output.glob("[!.]*")} - {*before}:
            raise UserError(
                f"--resume: {output} has no training.json, so it holds no run to continue; give "
                "the --output of that run, or a new folder"
            )
        self.arguments = training_arguments(checkpoints, options)
        self.trackers = tracker_callbacks(options.report_to or (), output)

    def train(
        self,
        make_trainer: Callable[[], RunTrainer],
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        progress: ReportStep | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Train, and save the model, its tokenizer, its log and its options in the folder.

        Args:
            make_trainer: Returns the trainer; everything random is seeded before the call.
            tokenizer: Saved with the model, if any.
            progress: Called after each step and with each log entry.
            announce: Called with an estimate of the time, before the first step of a longer run
                without a limit.

        Returns:
            ``steps``, ``seconds`` (all parts of a resumed run together), ``processor_seconds``
            with a time limit, ``parameters``, and the last validation metrics.

        Raises:
            Interrupted: A signal stopped the run, which has saved a checkpoint.
        """
        options, checkpoint = self.options, self.checkpoint
        transformers.set_seed(options.seed)
        trainer = make_trainer()
        model: Any = trainer.model
        if is_first_process() and not self._continued:
            write_result(self._settings, self.record, "training", seed=options.seed)
        stop = StopCallback()
        clock = ClockCallback()
        if checkpoint is not None:
            clock.seconds = ClockCallback.seconds_at(checkpoint)
            if trainer.limit is not None:
                trainer.limit.seconds = TimeLimitCallback.seconds_at(checkpoint)
        # The progress display of transformers prints raw dictionaries.
        trainer.remove_callback(transformers.ProgressCallback)
        trainer.remove_callback(transformers.PrinterCallback)
        for callback in (
            RedrawCallback(model, options.redraw_steps, options.seed),
            IntervalsCallback(),
            TrimCallback(),
            stop,
        ):
            trainer.add_callback(callback)
        if announce is not None and trainer.limit is None:
            trainer.add_callback(EstimateCallback(trainer, announce))
        # After the estimate, whose batches are no training.
        trainer.add_callback(clock)
        if progress is not None:
            trainer.add_callback(ProgressCallback(progress, trainer.limit))
        if trainer.limit is not None and trainer.limit.reached and checkpoint is not None:
            # To load the last checkpoint and take no step.
            trainer.args.max_steps = int(checkpoint.name.removeprefix("checkpoint-"))
        again = "repeat the command with --resume, which continues from the last checkpoint"
        with quiet_transformers(), stop_on_signals(stop), lost_processes(again):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if stop.requested:
            raise Interrupted(
                f"stopped after step {trainer.state.global_step} of {options.steps}; a checkpoint "
                "is in the output folder: run the same command with --resume to continue"
            )
        with lost_processes(again):
            # Already at hand, but for a run that had ended before it was resumed.
            validated = trainer.evaluate()
            state_dict = trainer.full_state_dict()
        result = {
            "steps": trainer.state.global_step,
            "seconds": round(clock.seconds, 2),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **validated,
        }
        if trainer.limit is not None:
            result["processor_seconds"] = round(trainer.limit.seconds, 2)
        if trainer.is_world_process_zero():
            with quiet_transformers():
                trained: Any = trainer.accelerator.unwrap_model(trainer.model)
                parts = filter(None, (trained, tokenizer))
                save_model_folder(self.output, *parts, state_dict=state_dict)
            trainer.state.save_to_json(str(self.output / "trainer_state.json"))
            ended = {**self.record, "result": result}
            write_result(self._settings, ended, "training", seed=options.seed, model=self.output)
        with lost_processes(again):
            trainer.accelerator.wait_for_everyone()
        return result


def check_same_run(
    settings: Path, record: dict[str, Any], options: TrainingOptions
) -> dict[str, Any]:
    """Check the record and options of a run against the ``training.json`` that it is to continue.

    Returns:
        The record in that file.

    Raises:
        UserError: The folder holds another run; the message names the difference.
    """
    earlier = read_json(settings)
    if not isinstance(earlier, dict) or not {"options", "data"} <= earlier.keys():
        raise UserError(f"{settings} is not the record of a training run; give another --output")

    def other_run(difference: str, remedy: str) -> UserError:
        return UserError(
            f"--resume continues the run in the folder, but {difference}; {remedy}, or give "
            "another --output"
        )

    changed = options.differences(earlier["options"])
    if changed:
        raise other_run("; ".join(changed), "repeat the options of that run")
    if earlier["data"].get("sha256") != record["data"]["sha256"]:
        raise other_run("the data are not the same", "give the same files")
    then, now = earlier.get("processes", 1), record["processes"]
    if then != now:
        raise other_run(f"that ran in {then} processes and this in {now}", "start as many")
    begun, wanted = (x.get("initial_model") or {} for x in (earlier, record))
    if any(value not in (None, begun.get(name)) for name, value in wanted.items()):
        raise other_run(
            f"--initial-model was {begun.get('name')}, with SHA-256 {begun.get('sha256')}, now "
            f"{wanted['name']}, {wanted['sha256']}",
            "leave it out",
        )
    return earlier
