"""Training of protein language models, on transformers' Trainer.

A run is exactly resumable: batches and masks are functions of the seed and of their place in the
run, redraws of the seed and the step, and the rest (weights, optimiser, schedule, dropout's random
state) is in the checkpoint.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from performers.app.errors import UserError
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.proteins.corpus import TokenShards
from performers.proteins.inputs.families import FamilyRows, ProteinFamilies
from performers.proteins.inputs.objectives import CausalCollator, MaskedCollator
from performers.proteins.inputs.packing import LengthBucketedBatchSampler, TokenDataset
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences
from performers.proteins.scoring.evaluation import evaluate_model, evaluate_rows
from performers.proteins.training.initial import initial_record, load_initial_weights
from performers.training.options import TrainingOptions
from performers.training.run import TrainingRun
from performers.training.trainer import RunTrainer

_HELD_OUT_AT_MOST = 500
# A row with relatives is many times a protein.
_FAMILY_ROWS_AT_MOST = 50


def train_model(
    sequences: Sequence[str] | TokenShards,
    output: Path,
    options: TrainingOptions,
    *,
    validation: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
    validation_families: Sequence[str] | None = None,
    initial_model: Path | None = None,
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
        output: Folder to write to.
        options: Options of the run.
        validation: Proteins to validate on; without them ``options.validation_fraction`` of
            ``sequences``, drawn with the seed, is held out (at most 500). A corpus has its own
            validation split, of which ``validation_sample`` takes as many.
        families: With ``options.families`` or ``options.family_power``, the family of each of
            ``sequences``.
        validation_families: Those of ``validation``, whose relatives are in ``sequences``; the
            first 50 are read.
        initial_model: Folder of a model to begin with, or ``performers-protein-small``, with
            ``initial_options``; random weights by default. A run that is resumed needs it no more.
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
    tokenizer = build_protein_tokenizer(options.max_length, closed=options.objective == "mlm")
    if (families is None) == options.needs_families:
        raise ValueError(
            "families: expected with options.families or options.family_power, and without them "
            "none"
        )
    if options.families is not None and (validation is None) != (validation_families is None):
        raise ValueError("validation_families: expected with families and validation")
    if validation is None:
        if isinstance(sequences, TokenShards):
            raise ValueError("validation: expected proteins to go with a split of a corpus")
        kept, held = _hold_out(len(sequences), options)
        validation = [sequences[index] for index in held]
        sequences = [sequences[index] for index in kept]
        if families is not None:
            validation_families = [families[index] for index in held]
            families = [families[index] for index in kept]
    named: list[Sequence[str]] = []
    if families is not None:
        named = [families, validation_families or []]
    run = TrainingRun(
        output,
        _fingerprint(sequences, validation, *named),
        options,
        resume=resume,
        initial_model=None if initial_model is None else initial_record(initial_model),
    )

    def trainer() -> _ProteinTrainer:
        model_class = PerformerForCausalLM if options.objective == "clm" else PerformerForMaskedLM
        model = model_class(options.model_config(tokenizer))
        if run.checkpoint is None and "initial_model" in run.record:
            if initial_model is None:
                raise UserError("--resume: no checkpoint was saved; give --initial-model once more")
            load_initial_weights(model, initial_model, options)
        dataset, validated = _data(tokenizer, sequences, validation, named, options)
        copies = None
        if options.family_power:
            copies = _copies(named[0], dataset.sequence_of_row, options.family_power)
        return _ProteinTrainer(
            run=run,
            dataset=dataset,
            tokenizer=tokenizer,
            validation=validated,
            copies=copies,
            model=model,
        )

    return run.train(trainer, tokenizer, progress=progress, announce=announce)


class _ProteinTrainer(RunTrainer):
    """Trainer with token budgets and metrics per residue."""

    def __init__(
        self,
        *,
        run: TrainingRun,
        tokenizer: PreTrainedTokenizerBase,
        validation: Sequence[str] | FamilyRows,
        copies: npt.NDArray[np.float64] | None,
        **arguments: Any,
    ) -> None:
        options, self.copies = run.options, copies
        masks: dict[str, Any] = {"mask_probability": options.mask_probability, "seed": options.seed}
        self.collator: MaskedCollator | CausalCollator = CausalCollator(tokenizer)
        if options.objective == "mlm":
            self.collator = MaskedCollator(tokenizer, **masks)
        masks["batch_tokens"] = options.batch_tokens

        def measure(model: Any) -> dict[str, float]:
            if isinstance(validation, FamilyRows):
                return evaluate_rows(model, tokenizer, validation, **masks)
            length = options.max_length
            return evaluate_model(model, tokenizer, validation, max_length=length, **masks)

        super().__init__(run=run, measure=measure if validation else None, **arguments)

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of some rows, masked where the objective is to fill in."""
        batch = self.collator(examples)
        if self.options.across_sequences:
            batch.pop("sequence_ids", None)
        return batch

    def sampler(self, batches: int) -> LengthBucketedBatchSampler:
        """Batches of rows of similar lengths, within a budget of tokens."""
        dataset: Any = self.train_dataset
        return LengthBucketedBatchSampler(
            dataset.lengths,
            max_tokens=self.options.batch_tokens,
            seed=self.options.seed,
            num_batches=batches,
            copies=self.copies,
        )


def _fingerprint(
    training: Sequence[str] | TokenShards, validation: Sequence[str], *families: Sequence[str]
) -> dict[str, Any]:
    """Data of a run: how much, and the SHA-256 of its content and of the names of families."""
    digest = hashlib.sha256()
    groups = [validation, *families]
    if isinstance(training, TokenShards):
        residues = training.entry["residues"]
        digest.update(training.fingerprint().encode())
    else:
        residues = sum(map(len, training))
        groups.insert(0, training)
    for group in groups:
        for text in group:
            digest.update(text.encode() + b"\n")
        digest.update(b"\n")
    return {
        "sequences": len(training),
        "residues": residues,
        "validation_sequences": len(validation),
        "sha256": digest.hexdigest(),
    }


def validation_sample(shards: TokenShards, seed: int) -> list[str]:
    """Draw at most 500 proteins of a validation split with the seed."""
    order = np.random.default_rng(seed).permutation(len(shards))[:_HELD_OUT_AT_MOST]
    return [shards.sequence(index) for index in sorted(order.tolist())]


def _data(
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str] | TokenShards,
    validation: Sequence[str],
    families: Sequence[Sequence[str]],
    options: TrainingOptions,
) -> tuple[TokenDataset | FamilyRows, Sequence[str] | FamilyRows]:
    """Rows to train on, and proteins to validate on, in rows with relatives to train on."""
    sizes: dict[str, Any] = {"max_length": options.max_length, "seed": options.seed}
    tokens: Sequence[Any] = sequences
    if not isinstance(sequences, TokenShards):
        tokens = encode_sequences(tokenizer, sequences)
    if options.families is None:
        return TokenDataset(tokens, packed=options.packed, learnable=True, **sizes), validation
    known = ProteinFamilies(tokens, families[0])
    try:
        rows = FamilyRows(known, hidden=options.families, alone=options.alone, **sizes)
    except ValueError as error:
        raise UserError(f"--families: {error}") from error
    validated = encode_sequences(tokenizer, validation[:_FAMILY_ROWS_AT_MOST])
    if not validated:
        return rows, []
    proteins = ProteinFamilies(validated, families[1][:_FAMILY_ROWS_AT_MOST])
    return rows, FamilyRows(proteins, hidden="one", relatives=known, **sizes)


def _copies(
    families: Sequence[str], sequence_of_row: npt.NDArray[np.int64], power: float
) -> npt.NDArray[np.float64]:
    """Mean number of times that each row is read in an epoch of as many rows as there are."""
    _, family, sizes = np.unique(np.array(families), return_inverse=True, return_counts=True)
    weights = sizes[family[sequence_of_row]].astype(float) ** power
    return weights / weights.mean()


def _hold_out(count: int, options: TrainingOptions) -> tuple[list[int], list[int]]:
    """Indices of the sequences to train on, and of those to validate on, in order."""
    held_out = min(int(options.validation_fraction * count), _HELD_OUT_AT_MOST)
    held = set(np.random.default_rng(options.seed).permutation(count)[:held_out].tolist())
    return [index for index in range(count) if index not in held], sorted(held)
