"""Attention of a model over proteins: maps, head scores, similarity of amino acids."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.progress import Progress
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import residue_ids
from performers.proteins.reading.head_scores import HeadScores, local_global_score, looks_causal
from performers.proteins.reading.similarity import AttentionSimilarity, embedding_similarity
from performers.proteins.reading.site_scores import score_sites
from performers.proteins.scoring.batches import evaluation_mode

# Attention matrices of so many sequences are held at a time.
_BATCH_SIZE = 4
# Vig et al. 2020 drop attention of at most so much.
_THRESHOLD = 0.1


@dataclass(frozen=True)
class ModelAnalysis:
    """Attention of one model.

    Attributes:
        protein: The protein behind `maps` and `scores`.
        sequences: Number of sequences run through the model for `similarity`.
        available: Number of sequences they were drawn from.
        cropped: How many of them were longer than `max_length` allows and lost their end.
        max_length: Largest number of tokens in one sequence, special tokens included.
        embeddings: Similarity of the amino acids' input embeddings; see `embedding_similarity`.
        labels: Residues of the protein as the model saw them, cropped, special tokens dropped.
        maps: Attention between those residues, one array (heads, n, n) per layer; empty when the
            model returned none.
        scores: How local, global and vertical each head is on that protein; None without maps.
        similarity: Attention by amino acid over the sequences, `all` of it and what is
            `thresholded`; empty when the model returned none.
        problem: Reason that there is no attention to show; empty otherwise.
        sites: How much attention known sites of `protein` receive, see `score_sites`; None when
            none were given, or none lies among `labels`.
    """

    protein: ProteinRecord
    sequences: int
    available: int
    cropped: int
    max_length: int
    embeddings: NDArray[np.float64]
    labels: str = ""
    maps: tuple[NDArray[np.float32], ...] = ()
    scores: HeadScores | None = None
    similarity: Mapping[str, AttentionSimilarity] = field(default_factory=dict)
    problem: str = ""
    sites: Mapping[str, Any] | None = None


def analyse_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    protein: ProteinRecord,
    max_sequences: int = 800,
    max_length: int = 512,
    sites: Sequence[int] = (),
    progress: Progress | None = None,
) -> ModelAnalysis:
    """Read attention maps, head scores and amino-acid similarity from a model.

    Attention matrices are quadratic in the length, so sequences are cropped to their first
    `max_length` tokens, and to the model's `max_position_embeddings` where its config has one.

    Args:
        model: A transformers model whose output has `attentions` when asked; it is run where it
            is, in evaluation mode without gradients, and left in the mode it came in.
        tokenizer: Its tokenizer, one token per residue.
        sequences: The proteins behind the similarity, as letters.
        protein: The protein whose attention is mapped.
        max_sequences: At most this many of `sequences` are used, drawn at random.
        max_length: Tokens kept of each sequence, special tokens included; at least 3.
        sites: Numbers, from 1, of residues of `protein` to mark; see `score_sites`.
        progress: Called with the sequences done and the sequences in all, after each batch.

    Returns:
        The analysis; when the model returns no attention, one whose `problem` says so.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        max_length = min(max_length, positions)
    room = max_length - tokenizer.num_special_tokens_to_add()
    chosen = list(sequences)
    if len(chosen) > max_sequences:
        chosen = random.Random(0).sample(chosen, max_sequences)
    # Alike lengths side by side waste least on padding.
    chosen.sort(key=len)
    analysis = ModelAnalysis(
        protein,
        sequences=len(chosen),
        available=len(sequences),
        cropped=sum(len(sequence) > room for sequence in chosen),
        max_length=max_length,
        embeddings=embedding_similarity(model, tokenizer),
    )
    input_ids, attentions = _attentions(model, tokenizer, [protein.sequence[:room]])
    if not attentions:
        return replace(
            analysis,
            problem="This model returned no attention weights, so there is nothing to map or "
            "to compare. A model that computes exact attention in a fused kernel keeps none: "
            'load it with attn_implementation="eager".',
        )
    attentions = [weights[0] for weights in attentions]
    keep = torch.isin(input_ids[0], torch.from_numpy(residue_ids(tokenizer)))
    letters = "".join(tokenizer.convert_ids_to_tokens(input_ids[0, keep].tolist()))
    maps = tuple(w.float().cpu()[:, keep][:, :, keep].numpy() for w in attentions)
    scores = local_global_score(attentions, keep, is_causal=looks_causal(maps))
    similarity = {
        "all": AttentionSimilarity(tokenizer),
        "thresholded": AttentionSimilarity(tokenizer, threshold=_THRESHOLD),
    }
    for start in range(0, len(chosen), _BATCH_SIZE):
        batch = [sequence[:room] for sequence in chosen[start : start + _BATCH_SIZE]]
        input_ids, attentions = _attentions(model, tokenizer, batch)
        for kind in similarity.values():
            kind.update(input_ids, attentions)
        if progress is not None:
            progress(start + len(batch), len(chosen))
    return replace(
        analysis,
        labels=letters,
        maps=maps,
        scores=scores,
        similarity=similarity,
        sites=score_sites(maps, letters, sites),
    )


def _attentions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: list[str]
) -> tuple[Tensor, list[Tensor]]:
    """Token ids (B, L), and one (B, H, L, L) per layer; none where the model gives none."""
    encoded = tokenizer(sequences, padding=True, return_tensors="pt")
    inputs = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with evaluation_mode(model):
        attentions = getattr(model(**inputs, output_attentions=True), "attentions", None)
    if not attentions or any(weights is None for weights in attentions):
        attentions = ()
    return encoded["input_ids"], list(attentions)
