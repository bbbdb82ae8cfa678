"""Attention of a model over proteins: maps, head scores, similarity of amino acids."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.progress import Progress
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.reading.head_scores import (
    HeadScores,
    local_global_score,
    looks_causal,
    residue_mask,
)
from performers.proteins.reading.similarity import AttentionSimilarity, embedding_similarity
from performers.proteins.reading.site_scores import SiteScores, score_sites
from performers.proteins.scoring.batches import evaluation_mode

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
        labels: Residues of the protein as the model saw them, cropped, special tokens dropped.
        maps: Attention between those residues, one array (heads, n, n) per layer; empty when the
            model returned none.
        scores: How local, global and vertical each head is on that protein; None without maps.
        similarity: Attention by amino acid over the sequences, `all` of it and what is
            `thresholded`; empty when the model returned none.
        problem: Reason that there is no attention to show; empty otherwise.
        sites: How much attention known sites of `protein` receive; None when none were given, or
            none lies among `labels`.
        embeddings: Similarity of the amino acids' input embeddings; see `embedding_similarity`.
    """

    protein: ProteinRecord
    sequences: int
    available: int
    cropped: int
    max_length: int
    labels: str = ""
    maps: tuple[NDArray[np.float32], ...] = ()
    scores: HeadScores | None = None
    similarity: Mapping[str, AttentionSimilarity] = field(default_factory=dict)
    problem: str = ""
    sites: SiteScores | None = None
    embeddings: NDArray[np.float64] | None = None


def analyse_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    protein: ProteinRecord,
    max_sequences: int = 800,
    max_length: int = 512,
    batch_size: int = 4,
    band: int = 8,
    sites: Sequence[int] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelAnalysis:
    """Read attention maps, head scores and amino-acid similarity from a model.

    Attention matrices are quadratic in the length, so sequences are cropped to their first
    `max_length` tokens, and to the model's `max_position_embeddings` where its config has one.
    One batch holds layers × batch_size × heads × max_length² weights at a time.

    Args:
        model: A transformers model whose output has `attentions` when asked; it is run where it
            is, in evaluation mode without gradients, and left in the mode it came in.
        tokenizer: Its tokenizer, one token per residue.
        sequences: The proteins behind the similarity, as letters.
        protein: The protein whose attention is mapped.
        max_sequences: At most this many of `sequences` are used, drawn at random with `seed`.
        max_length: Tokens kept of each sequence, special tokens included; at least 3.
        batch_size: Sequences in a batch.
        band: Half-width, in residues, of the band of local attention.
        sites: Numbers, from 1, of residues of `protein` to mark; see `score_sites`.
        seed: Seed of the draws.
        progress: Called with the sequences done and the sequences in all, after each batch.

    Returns:
        The analysis; when the model returns no attention, one whose `problem` says so.

    Raises:
        ValueError: A number is too small or the tokenizer lacks an amino acid.
    """
    limits = {"max_sequences": 1, "max_length": 3, "batch_size": 1}
    given = {"max_sequences": max_sequences, "max_length": max_length, "batch_size": batch_size}
    for name, least in limits.items():
        if given[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {given[name]}")
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        max_length = min(max_length, positions)
    room = max_length - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise ValueError(
            f"max_length must leave room for a residue beside the special tokens; this model takes "
            f"{max_length} tokens"
        )
    chosen = list(sequences)
    if len(chosen) > max_sequences:
        chosen = random.Random(seed).sample(chosen, max_sequences)
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
    tokens = _encode(tokenizer, [protein.sequence[:room]])
    attentions = _attentions(model, tokens)
    if attentions is None:
        return replace(
            analysis,
            problem="This model returned no attention weights, so there is nothing to map or "
            "to compare. A model that computes exact attention in a fused kernel keeps none: "
            'load it with attn_implementation="eager".',
        )
    residues = residue_mask(
        tokens["input_ids"], tokens["attention_mask"], tokenizer.all_special_ids
    )
    keep = residues[0].cpu()
    letters = "".join(tokenizer.convert_ids_to_tokens(tokens["input_ids"][0].cpu()[keep].tolist()))
    maps = tuple(w[0].float().cpu()[:, keep][:, :, keep].numpy() for w in attentions)
    scores = None
    if keep.any():
        scores = local_global_score(attentions, residues, band=band, is_causal=looks_causal(maps))
    marked = None
    # A tokenizer that lacks a letter leaves a gap, and numbers would name other residues.
    if sites and letters == protein.sequence[: len(letters)]:
        marked = score_sites(maps, letters, sites, seed=seed)
    similarity = {
        "all": AttentionSimilarity(tokenizer),
        "thresholded": AttentionSimilarity(tokenizer, threshold=_THRESHOLD),
    }
    for start in range(0, len(chosen), batch_size):
        batch = [sequence[:room] for sequence in chosen[start : start + batch_size]]
        tokens = _encode(tokenizer, batch)
        weights = _attentions(model, tokens) or ()
        for kind in similarity.values():
            kind.update(tokens["input_ids"], tokens["attention_mask"], weights)
        if progress is not None:
            progress(min(start + batch_size, len(chosen)), len(chosen))
    return replace(
        analysis, labels=letters, maps=maps, scores=scores, similarity=similarity, sites=marked
    )


def _encode(tokenizer: PreTrainedTokenizerBase, sequences: list[str]) -> dict[str, Tensor]:
    encoded = tokenizer(sequences, padding=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _attentions(model: PreTrainedModel, tokens: dict[str, Tensor]) -> tuple[Tensor, ...] | None:
    """One (B, H, L, L) per layer, or None where the model gives none."""
    inputs = {name: tensor.to(model.device) for name, tensor in tokens.items()}
    with evaluation_mode(model):
        attentions = getattr(model(**inputs, output_attentions=True), "attentions", None)
    if not attentions or any(weights is None for weights in attentions):
        return None
    return tuple(attentions)
