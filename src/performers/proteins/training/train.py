"""Training of protein language models, on transformers' Trainer.

A run is exactly resumable: batches and masks are functions of the seed and of their place in the
run, redraws of the seed and the step, and the rest (weights, optimiser, schedule, dropout's random
state) is in the checkpoint.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from performers.app.errors import Diverged, Interrupted, UserError
from performers.app.processes import is_first_process
from performers.app.provenance import write_result
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.models.manifest import save_model_folder
from performers.proteins.corpus import ShardedRows, TokenShards
from performers.proteins.inputs.objectives import CausalCollator, MaskedCollator
from performers.proteins.inputs.packing import (
    LengthBucketedBatchSampler,
    PackedRow,
    TokenDataset,
    pack_sequences,
    split_windows,
)
from performers.proteins.inputs.tokenizer import (
    build_protein_tokenizer,
    encode_sequences,
    residue_ids,
)
from performers.proteins.model_folder import quiet_transformers
from performers.proteins.options import TrainingOptions
from performers.proteins.scoring.evaluation import evaluate_model
from performers.proteins.training.arguments import tracker_callbacks, training_arguments
from performers.proteins.training.estimate import EstimateCallback
from performers.proteins.training.record import (
    check_same_run,
    last_complete_checkpoint,
    run_record,
)
from performers.training.callbacks import (
    ClockCallback,
    IntervalsCallback,
    ProgressCallback,
    RedrawCallback,
    StopCallback,
    TrimCallback,
    stop_on_signals,
)
from performers.training.checkpoints import CheckpointTrainer
from performers.training.optimizers import MuonAdamW, check_muon

_HELD_OUT_AT_MOST = 500


def train_model(
    sequences: Sequence[str] | TokenShards,
    output: Path,
    options: TrainingOptions,
    *,
    validation: Sequence[str] | None = None,
    resume: bool = False,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a model and save it, its tokenizer, its log and its options in ``output``.

    A signal stops the run, which saves a checkpoint and raises ``Interrupted``.

    The folder receives ``config.json``, ``model.safetensors`` and the tokenizer's files with their
    ``manifest.json``, ``trainer_state.json`` (the log), ``training.json`` (options, data, time) and
    ``checkpoints/``.

    Args:
        sequences: Proteins as letters, or a split of a corpus, which stays on disk.
        output: Folder to write to; see ``prepare_output_folder``.
        options: Options of the run.
        validation: Proteins to validate on; without them ``options.validation_fraction`` of
            ``sequences``, drawn with the seed, is held out (at most 500). A corpus has its own
            validation split, of which ``validation_sample`` takes as many.
        resume: Continue from the newest checkpoint in ``output`` that is complete and undamaged;
            from the start if the saving of none had ended.
        progress: Called with the step, the steps in all and the latest log entry.
        announce: Called with an estimate of the time, before the first step of a longer run.

    Returns:
        ``steps``, ``seconds`` (all parts of a resumed run together), ``parameters``, and the last
        validation metrics.

    Raises:
        UserError: The data or options cannot be used, the options differ from those of the run
            to resume, all its checkpoints are damaged, or the loss or the weights are not finite
            (``Diverged``).
    """
    if options.optimizer == "muon":
        try:
            check_muon()
        except RuntimeError as error:
            raise UserError(f"--optimizer muon: {error} (--optimizer adamw)") from error
    tokenizer = build_protein_tokenizer(options.max_length, closed=options.objective == "mlm")
    if validation is None:
        if isinstance(sequences, TokenShards):
            raise ValueError("validation: expected proteins to go with a split of a corpus")
        sequences, validation = _hold_out(sequences, options)
    record = run_record(options, sequences, validation)
    settings = output / "training.json"
    checkpoint = None
    continued = resume and settings.exists()
    if continued:
        check_same_run(settings, record, options)
        checkpoint = last_complete_checkpoint(output / "checkpoints")
    elif resume and is_first_process() and output.is_dir() and any(output.glob("[!.]*")):
        raise UserError(
            f"--resume: {output} has no training.json, so it holds no run to continue; give the "
            "--output of that run, or a new folder"
        )

    arguments = training_arguments(output / "checkpoints", options)
    trackers = tracker_callbacks(options.report_to or (), output)
    transformers.set_seed(options.seed)
    model = _build_model(options, tokenizer)
    dataset = _dataset(tokenizer, sequences, options)
    if is_first_process() and not continued:
        write_result(settings, record, "training", seed=options.seed)
    stop = StopCallback()
    clock = ClockCallback(0.0 if checkpoint is None else ClockCallback.seconds_at(checkpoint))
    trainer = _ProteinTrainer(
        options=options,
        dataset=dataset,
        tokenizer=tokenizer,
        validation=validation,
        model=model,
        args=arguments,
        callbacks=[
            RedrawCallback(model, options.redraw_steps, options.seed),
            IntervalsCallback(),
            TrimCallback(),
            stop,
            *trackers,
        ],
    )
    # The progress display of transformers prints raw dictionaries.
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    if announce is not None:
        trainer.add_callback(EstimateCallback(trainer, trainer.first_batch, announce))
    # After the estimate, whose batches are no training.
    trainer.add_callback(clock)
    if progress is not None:
        trainer.add_callback(ProgressCallback(progress))
    with quiet_transformers(), stop_on_signals(stop):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.requested:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} of {options.steps}; a checkpoint is "
            "in the output folder: run the same command with --resume to continue"
        )
    # Already at hand, but for a run that had ended before it was resumed.
    validated = trainer.evaluate()
    result = {
        "steps": trainer.state.global_step,
        "seconds": round(clock.seconds, 2),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **validated,
    }
    if trainer.is_world_process_zero():
        with quiet_transformers():
            save_model_folder(output, trainer.accelerator.unwrap_model(trainer.model), tokenizer)
        trainer.state.save_to_json(str(output / "trainer_state.json"))
        ended = {**record, "result": result}
        write_result(settings, ended, "training", seed=options.seed, model=output)
    trainer.accelerator.wait_for_everyone()
    return result


class _ProteinTrainer(CheckpointTrainer):
    """Trainer with token budgets, metrics per residue, and an end to runs that diverge."""

    def __init__(
        self,
        *,
        options: TrainingOptions,
        dataset: TokenDataset | ShardedRows,
        tokenizer: PreTrainedTokenizerBase,
        validation: Sequence[str],
        **arguments: Any,
    ) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.validation = validation
        self.collator: MaskedCollator | CausalCollator = CausalCollator(tokenizer)
        if options.objective == "mlm":
            self.collator = MaskedCollator(
                tokenizer, mask_probability=options.mask_probability, seed=options.seed
            )
        super().__init__(
            train_dataset=dataset, eval_dataset=dataset, data_collator=self._collate, **arguments
        )

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        if self.options.across_sequences:
            batch.pop("sequence_ids", None)
        return batch

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The whole run as one pass, so that to resume is to skip batches."""
        dataset = self.train_dataset
        assert isinstance(dataset, (TokenDataset, ShardedRows))
        batches = self.options.steps * self.options.accumulation * self.args.world_size
        loader = DataLoader(
            dataset,
            batch_sampler=self._sampler(dataset, batches),
            collate_fn=self.data_collator,
            # A separate generator, so that making an iterator draws nothing from dropout's.
            generator=torch.Generator().manual_seed(self.options.seed),
        )
        return self.accelerator.prepare(loader)

    def first_batch(self) -> dict[str, torch.Tensor]:
        """The first batch of the run."""
        dataset = self.train_dataset
        assert isinstance(dataset, (TokenDataset, ShardedRows))
        return self._collate([dataset[key] for key in next(iter(self._sampler(dataset, 1)))])

    def _sampler(
        self, dataset: TokenDataset | ShardedRows, batches: int
    ) -> LengthBucketedBatchSampler:
        return LengthBucketedBatchSampler(
            dataset.lengths,
            max_tokens=self.options.batch_tokens,
            seed=self.options.seed,
            num_batches=batches,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's AdamW, or Muon."""
        if self.options.optimizer == "muon" and getattr(self, "optimizer", None) is None:
            self.optimizer = MuonAdamW(
                self.accelerator.unwrap_model(self.model),
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return super().create_optimizer(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on one batch; a loss that is not finite raises ``Diverged``."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise _diverged(f"the loss became {loss.item()} at", self.state.global_step + 1)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics per residue on the validation sequences, logged as ``eval_...``."""
        if not self.validation:
            return {}
        for entry in reversed(self.state.log_history):
            if entry.get("step") == self.state.global_step and "eval_loss" in entry:
                return {name: value for name, value in entry.items() if name.startswith("eval_")}
        metrics = evaluate_model(
            self.accelerator.unwrap_model(self.model),
            self.tokenizer,
            self.validation,
            max_length=self.options.max_length,
            batch_tokens=self.options.batch_tokens,
            mask_probability=self.options.mask_probability,
            seed=self.options.seed,
        )
        logged = {f"eval_{name}": float(value) for name, value in metrics.items()}
        self.log(dict(logged))
        return logged

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        weights = self.model.parameters()
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            raise _diverged("the weights are not finite after", self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)


def _diverged(what: str, step: int) -> Diverged:
    return Diverged(
        f"{what} step {step}; lower --learning-rate or raise --warmup-steps and train anew, or "
        "--resume from the last checkpoint with the same options if the machine was at fault"
    )


def _build_model(
    options: TrainingOptions, tokenizer: PreTrainedTokenizerBase
) -> PerformerForCausalLM | PerformerForMaskedLM:
    config = options.model_config(tokenizer)
    model_class = PerformerForCausalLM if options.objective == "clm" else PerformerForMaskedLM
    model = model_class(config)
    if options.gradient_checkpointing:
        # The older name warns where there is the newer one.
        newer = "activation_checkpointing_enable"
        name = newer if hasattr(model, newer) else "gradient_checkpointing_enable"
        getattr(model, name)({"use_reentrant": False})
    return model


def validation_sample(shards: TokenShards, seed: int) -> list[str]:
    """Draw at most 500 proteins of a validation split with the seed."""
    order = np.random.default_rng(seed).permutation(len(shards))[:_HELD_OUT_AT_MOST]
    return [shards.sequence(index) for index in sorted(order.tolist())]


def _dataset(
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str] | TokenShards,
    options: TrainingOptions,
) -> TokenDataset | ShardedRows:
    if isinstance(sequences, TokenShards):
        return ShardedRows(
            sequences, max_length=options.max_length, packed=options.packed, seed=options.seed
        )
    return TokenDataset(_rows(tokenizer, sequences, options))


def _rows(
    tokenizer: PreTrainedTokenizerBase, sequences: Sequence[str], options: TrainingOptions
) -> list[Any]:
    encoded = encode_sequences(tokenizer, sequences)
    rows: list[Any]
    if options.packed:
        random = np.random.default_rng(options.seed)
        shuffled = [encoded[index] for index in random.permutation(len(encoded))]
        rows = list(pack_sequences(shuffled, options.max_length))
    else:
        rows = [
            window for tokens in encoded for window in split_windows(tokens, options.max_length)
        ]
    residues = residue_ids(tokenizer)

    def has_targets(row: Any) -> bool:
        tokens = row.input_ids if isinstance(row, PackedRow) else row
        return int(np.isin(tokens, residues).sum()) > 1

    # A row without anything to predict has no loss.
    rows = [row for row in rows if has_targets(row)]
    if not rows:
        raise UserError("the training sequences have no two residues in a row to learn from")
    return rows


def _hold_out(sequences: Sequence[str], options: TrainingOptions) -> tuple[list[str], list[str]]:
    count = min(int(options.validation_fraction * len(sequences)), _HELD_OUT_AT_MOST)
    held = np.random.default_rng(options.seed).permutation(len(sequences))[:count]
    chosen = set(held.tolist())
    kept = [sequence for index, sequence in enumerate(sequences) if index not in chosen]
    return kept, [sequences[index] for index in sorted(chosen)]
