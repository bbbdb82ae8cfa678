"""Accuracy, perplexity and loss of a model on sequences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.progress import Progress
from performers.proteins.inputs.families import FamilyRows
from performers.proteins.inputs.objectives import ALL_HIDDEN, CausalCollator, MaskedCollator
from performers.proteins.inputs.packing import TokenDataset, split_windows
from performers.proteins.inputs.relatives import RelativesRows
from performers.proteins.inputs.tokenizer import encode_sequences
from performers.proteins.scoring.batches import run_batches
from performers.proteins.scoring.metrics import ResidueMetrics


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    relatives: RelativesRows | None = None,
    max_length: int = 1024,
    by_sequence: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Score predictions per residue, beside the best constant prediction on the same residues.

    A causal model predicts every residue from those before it. A masked model predicts a share of
    the residues, all of them hidden behind the mask token: BERT's training rule leaves a tenth of
    them visible, and copying those would pass for an accuracy of its own. Which ones is a function
    of ``seed`` and the sequence's place in the list, so the same call gives the same number.

    Sequences of more than ``max_length`` tokens are split into windows; with ``relatives``, rows in
    which they are read after relatives, they are not, and the same residues of theirs are scored
    as without. The other options are those of `evaluate_rows`.

    Returns:
        ``accuracy``, ``perplexity``, ``loss`` (nats per residue), ``tokens`` (residues scored),
        ``baseline_accuracy``, ``baseline_perplexity``, ``sequences``; with ``by_sequence`` also
        lists ``correct_by_sequence`` and ``tokens_by_sequence``, in the order of the sequences.

    Raises:
        ValueError: There is no sequence, or an option is out of range.
        UserError: Learned positions end before ``max_length`` does.
    """
    dataset: TokenDataset | RelativesRows
    if relatives is None:
        windows = [split_windows(row, max_length) for row in encode_sequences(tokenizer, sequences)]
        dataset = TokenDataset(window for parts in windows for window in parts)
        rows = [len(parts) for parts in windows]
    else:
        dataset, rows = relatives, [1] * len(sequences)
    metrics = evaluate_rows(
        model,
        tokenizer,
        dataset,
        sequence_of_row=np.repeat(np.arange(len(rows)), rows) if by_sequence else None,
        **options,
    )
    return {**metrics, "sequences": len(sequences)}


def evaluate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenDataset | FamilyRows | RelativesRows,
    *,
    batch_tokens: int = 8192,
    mask_probability: float = 0.15,
    seed: int = 0,
    across_sequences: bool = False,
    sequence_of_row: npt.NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As ``evaluate_model``, without its ``sequences``, on rows that are cut already.

    Rows may be packed, or of proteins after their relatives; a longer row than ``batch_tokens`` is
    a batch of its own. ``across_sequences`` lets attention cross the boundaries of packed
    sequences; ``sequence_of_row`` counts sequences apart, by the number of each row's;
    ``progress`` is called with the rows done and the rows in all, after each batch.
    """
    is_causal = bool(model.config.is_decoder)
    collator: MaskedCollator | CausalCollator = CausalCollator(tokenizer)
    if not is_causal:
        collator = MaskedCollator(
            tokenizer, mask_probability=mask_probability, seed=seed, replaced=ALL_HIDDEN
        )

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collator(rows)
        if across_sequences:
            batch.pop("sequence_ids", None)
        return batch

    count = 0 if sequence_of_row is None else int(sequence_of_row.max()) + 1
    metrics = ResidueMetrics(tokenizer, is_causal=is_causal, sequences=count)
    for places, batch, output in run_batches(
        model, dataset, collate, batch_tokens=batch_tokens, progress=progress
    ):
        numbers = None if sequence_of_row is None else sequence_of_row[places]
        metrics.update(output.logits, batch["labels"], numbers)
    found = metrics.compute()
    if sequence_of_row is not None:
        found["correct_by_sequence"] = metrics.correct_of.tolist()
        found["tokens_by_sequence"] = metrics.tokens_of.tolist()
    return found
