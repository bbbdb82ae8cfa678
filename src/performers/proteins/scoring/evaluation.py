"""Accuracy, perplexity and loss of a model on sequences."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.progress import Progress
from performers.proteins.inputs.objectives import ALL_HIDDEN, CausalCollator, MaskedCollator
from performers.proteins.inputs.packing import (
    LengthBucketedBatchSampler,
    TokenDataset,
    split_windows,
)
from performers.proteins.inputs.tokenizer import encode_sequences
from performers.proteins.model_folder import check_input_length
from performers.proteins.scoring.metrics import ResidueMetrics


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    max_length: int = 1024,
    batch_tokens: int = 8192,
    mask_probability: float = 0.15,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score predictions per residue, beside the best constant prediction on the same residues.

    A causal model predicts every residue from those before it. A masked model predicts a share of
    the residues, all of them hidden behind the mask token: BERT's training rule leaves a tenth of
    them visible, and copying those would pass for an accuracy of its own. Which ones is a function
    of ``seed`` and the sequence's place in the list, so the same call gives the same number.

    Args:
        model: A masked or causal (``config.is_decoder``) language model.
        tokenizer: Its tokenizer.
        sequences: Proteins as letters, at least one.
        max_length: Longest input in tokens; longer sequences are split into windows.
        batch_tokens: Tokens in a batch, padding included.
        mask_probability: Share of residues that are targets of a masked model.
        seed: Seed of the masks.
        progress: Called with the rows done and the rows in all, after each batch.

    Returns:
        ``accuracy``, ``perplexity``, ``loss`` (nats per residue), ``tokens`` (residues scored),
        ``baseline_accuracy``, ``baseline_perplexity``, ``sequences``.

    Raises:
        ValueError: There is no sequence, or an option is out of range.
        UserError: Learned positions end before ``max_length`` does.
    """
    dataset = TokenDataset(
        window
        for tokens in encode_sequences(tokenizer, sequences)
        for window in split_windows(tokens, max_length)
    )
    metrics = evaluate_rows(
        model,
        tokenizer,
        dataset,
        batch_tokens=batch_tokens,
        mask_probability=mask_probability,
        seed=seed,
        progress=progress,
    )
    return {**metrics, "sequences": len(sequences)}


def evaluate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenDataset,
    *,
    batch_tokens: int = 8192,
    mask_probability: float = 0.15,
    seed: int = 0,
    across_sequences: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """As ``evaluate_model``, on rows that are cut already.

    Args:
        model: A masked or causal language model.
        tokenizer: Its tokenizer.
        dataset: The rows, packed or not.
        batch_tokens: Tokens in a batch, padding included; a longer row is a batch of its own.
        mask_probability: Share of residues that are targets of a masked model.
        seed: Seed of the masks.
        across_sequences: In packed rows, attention crosses the boundaries of sequences.
        progress: Called with the rows done and the rows in all, after each batch.

    Returns:
        ``accuracy``, ``perplexity``, ``loss``, ``tokens``, ``baseline_accuracy`` and
        ``baseline_perplexity``.
    """
    is_causal = bool(model.config.is_decoder)
    collator: MaskedCollator | CausalCollator = CausalCollator(tokenizer)
    if not is_causal:
        collator = MaskedCollator(
            tokenizer, mask_probability=mask_probability, seed=seed, replaced=ALL_HIDDEN
        )
    check_input_length(model, int(dataset.lengths.max()))
    sampler = LengthBucketedBatchSampler(
        dataset.lengths, max_tokens=max(batch_tokens, int(dataset.lengths.max())), shuffle=False
    )
    metrics = ResidueMetrics(tokenizer, is_causal=is_causal)
    was_training = model.training
    model.eval()
    done = 0
    try:
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collator,
            # Its own generator: a validation draws nothing from the training's dropout.
            generator=torch.Generator(),
        )
        for batch in loader:
            input_ids = batch["input_ids"].to(model.device)
            attention_mask = batch["attention_mask"].to(model.device)
            options: dict[str, Any] = {"use_cache": False} if is_causal else {}
            if "sequence_ids" in batch and not across_sequences:
                options["sequence_ids"] = batch["sequence_ids"].to(model.device)
            with torch.inference_mode():
                logits = model(input_ids, attention_mask, **options).logits
            metrics.update(logits, batch["labels"].to(logits.device))
            done += len(batch["input_ids"])
            if progress is not None:
                progress(done, len(dataset))
    finally:
        model.train(was_training)
    return metrics.compute()
