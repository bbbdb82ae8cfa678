"""A model's guesses of a protein's residues, each hidden from it, and maps of many proteins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.progress import Progress
from performers.proteins.inputs.objectives import CausalCollator
from performers.proteins.inputs.packing import TokenDataset, window_places
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, encode_sequences, residue_ids
from performers.proteins.scoring.batches import run_batches
from performers.proteins.scoring.embedding import embed_sequences

FOLDS = 7
"""Passes of a masked model over a protein; each hides a seventh of the residues, all in all each
residue once. Models are trained and evaluated with 15% hidden."""

SUBSTITUTES = 3
"""Number of likeliest other amino acids kept at each residue."""


@dataclass(frozen=True)
class ProteinReading:
    """One protein as a model reads it; residues other than the twenty amino acids have no guess.

    Attributes:
        record: The protein.
        probability: Of each residue, which the model does not see, given others, (length,); NaN
            where there is no guess. Masked models see what is left and right of it, causal models
            what is left.
        substitutes: Indices into `AMINO_ACIDS` of the likeliest other amino acids, likeliest first,
            (length, `SUBSTITUTES`).
        substitute_probability: Theirs, of the same shape.
        embedding: Mean of the final hidden states over the residues, (hidden_size,).
    """

    record: ProteinRecord
    probability: NDArray[np.float32]
    substitutes: NDArray[np.int64]
    substitute_probability: NDArray[np.float32]
    embedding: NDArray[np.float32]

    @property
    def surprise(self) -> float:
        """Mean of -log2 of the probabilities, in bits; NaN where there is no guess."""
        found = self.probability[np.isfinite(self.probability)]
        return float(-np.log2(found).mean()) if found.size else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of the guessed residues that are likelier than any other amino acid."""
        found = np.isfinite(self.probability)
        right = self.probability[found] > self.substitute_probability[found, 0]
        return float(right.mean()) if found.any() else float("nan")


def read_proteins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[ProteinRecord],
    *,
    max_length: int = 1024,
    progress: Progress | None = None,
) -> list[ProteinReading]:
    """Guess every residue of proteins without showing it to the model, and embed the proteins.

    Sequences of more than `max_length` tokens are split into windows. Embeddings are of whole
    sequences, as far as learned positions reach. `progress` is called with the rows read and the
    rows in all, after each batch.

    Returns:
        A reading for each protein, in the order given.
    """
    if not records:
        return []
    sequences = [record.sequence for record in records]
    letters = residue_ids(tokenizer, AMINO_ACIDS)
    guesses = [np.full((len(s), len(AMINO_ACIDS)), np.nan, np.float32) for s in sequences]
    is_causal = bool(model.config.is_decoder)
    rows = _rows(tokenizer, sequences, max_length, 1 if is_causal else FOLDS)
    batches: Iterable[tuple[list[int], Any, Any]] = ()
    if rows:
        dataset = TokenDataset(row.tokens for row in rows)
        batches = run_batches(model, dataset, CausalCollator(tokenizer), progress=progress)
    for places, _, output in batches:
        for place, scores in zip(places, output.logits.float().cpu(), strict=True):
            row = rows[place]
            # A causal model's scores at a place are of the next token.
            source = row.targets - 1 if is_causal else row.targets
            kept = row.targets[source >= 0]
            shares = scores[torch.from_numpy(source[source >= 0])].softmax(-1)[:, letters]
            guesses[row.protein][row.start + kept] = shares.numpy()
    longest = getattr(model.config, "longest_input", None)
    cropped = [s if longest is None else s[: longest - 2] for s in sequences]
    vectors = embed_sequences(model, tokenizer, cropped)
    return [_reading(*found) for found in zip(records, guesses, vectors, strict=True)]


def principal_components(vectors: NDArray[np.float32]) -> tuple[NDArray[np.float64], list[float]]:
    """Project vectors onto the two directions along which they differ most.

    Args:
        vectors: (count, width).

    Returns:
        Coordinates (count, 2), the largest of each axis positive, and the shares of the variance
        that the axes have.
    """
    centred = np.asarray(vectors, dtype=np.float64) - vectors.mean(0, dtype=np.float64)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(vectors), 2))
    count = min(2, len(sizes))
    places[:, :count] = (left * sizes)[:, :count]
    furthest = places[np.abs(places).argmax(0), [0, 1]]
    total = float((sizes**2).sum())
    shares = [float(size**2) / total if total else 0.0 for size in (*sizes, 0.0)[:2]]
    return places * np.where(furthest < 0, -1.0, 1.0), shares


class _Row(NamedTuple):
    """A window of a protein, as tokens, and the places in it that are guessed.

    `start` is the index in the protein of what the first token would be, were it a residue. Of a
    masked model the targets are hidden in the tokens.
    """

    protein: int
    start: int
    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    max_length: int,
    folds: int,
) -> list[_Row]:
    rows = []
    residues = residue_ids(tokenizer, AMINO_ACIDS)
    for protein, tokens in enumerate(encode_sequences(tokenizer, sequences)):
        fold = np.random.default_rng((0, protein)).permutation(len(tokens)) % folds
        fold[~np.isin(tokens, residues)] = -1
        _, starts, sizes = window_places(np.array([len(tokens)]), max_length)
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            window = tokens[start : start + size]
            for number in range(folds):
                targets = np.flatnonzero(fold[start : start + len(window)] == number)
                if targets.size:
                    shown = np.array(window, np.int64)
                    if folds > 1:
                        shown[targets] = tokenizer.mask_token_id
                    # The protein's first token is <bos>.
                    rows.append(_Row(protein, start - 1, shown, targets))
    return rows


def _reading(
    record: ProteinRecord, guesses: NDArray[np.float32], embedding: NDArray[np.float32]
) -> ProteinReading:
    true = np.array([AMINO_ACIDS.find(letter) for letter in record.sequence])
    places = np.arange(len(true))
    probability = np.where(true >= 0, guesses[places, true], np.nan)
    others = np.nan_to_num(guesses, nan=-1.0)
    others[places[true >= 0], true[true >= 0]] = -1.0
    substitutes = np.argsort(-others, axis=1, kind="stable")[:, :SUBSTITUTES]
    shares = np.take_along_axis(guesses, substitutes, axis=1)
    return ProteinReading(record, probability, substitutes, shares, embedding)
