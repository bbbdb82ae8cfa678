"""A protein language model with its tokenizer: embeddings and likelihoods of proteins."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.errors import UserError
from performers.app.progress import Progress
from performers.proteins.embedded import PRETRAINED, model_folder
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.relatives import Relatives
from performers.proteins.model_folder import check_input_length, load_model, model_max_length
from performers.proteins.scoring.embedding import embed_residues, embed_sequences
from performers.proteins.scoring.likelihood import ProteinScore, score_sequences
from performers.proteins.scoring.variants import VariantScorer, parse_variant


@dataclass(frozen=True)
class ProteinModel:
    """A protein language model, masked or causal.

    Attributes:
        network: The model, an ordinary transformers model.
        tokenizer: Its tokenizer.
        folder: Folder that both were loaded from.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    def check_length(self, residues: int) -> None:
        """Check that the model reads a protein of so many residues.

        Raises:
            UserError: Its learned positions, or its attention, end before.
        """
        check_input_length(self.network, residues + 2)

    def relatives(
        self, proteins: Sequence[str | ProteinRecord], max_tokens: int | None = None
    ) -> Relatives:
        """Relatives to read proteins with, as arguments of `embed` and `score`.

        Args:
            proteins: Sequences of residues, or records, whose headers may name families; see
                `Relatives`.
            max_tokens: Most tokens of a protein and its relatives; by default the length that the
                model was trained at.

        Raises:
            UserError: Some headers name a family and some do not.
            ValueError: A sequence has other letters than residues.
        """
        limit = model_max_length(self.tokenizer) if max_tokens is None else max_tokens
        return Relatives(_records(proteins), self.tokenizer, limit)

    def embed(
        self,
        proteins: Sequence[str | ProteinRecord],
        *,
        per_residue: bool = False,
        pooling: str = "mean",
        layer: int | None = None,
        relatives: Relatives | None = None,
        batch_tokens: int = 8192,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
        """Embed proteins as vectors, one a protein or one a residue.

        Args:
            proteins: Sequences of residues, or records.
            per_residue: Return a vector for each residue.
            pooling: Of the residues' vectors: ``"mean"``, or ``"mean-sd"`` for their standard
                deviation besides, twice as wide.
            layer: Hidden states to take: 0 before the first block, ``n`` after block ``n``,
                negative from the end; by default after the last.
            relatives: Relatives to read them with, see `relatives`.
            batch_tokens: Tokens in a batch, padding included.
            progress: Called with the proteins done and the proteins in all, after each batch.

        Returns:
            Shape ``(proteins, width)``; with ``per_residue`` one array of shape ``(residues,
            width)`` for each protein.

        Raises:
            UserError: A protein is longer than the model can read or has no relatives, or an
                option is unknown.
            ValueError: A sequence has other letters than residues.
        """
        if per_residue and pooling != "mean":
            raise UserError("pooling has no use with per_residue; leave one of the two away")
        records = _records(proteins)
        options: dict[str, Any] = {
            "layer": layer,
            "relatives": None if relatives is None else relatives.rows(records),
            "batch_tokens": batch_tokens,
            "progress": progress,
        }
        model = (self.network, self.tokenizer, [record.sequence for record in records])
        if per_residue:
            return embed_residues(*model, **options)
        return embed_sequences(*model, pooling=pooling, **options)

    def score(
        self,
        proteins: Sequence[str | ProteinRecord],
        *,
        method: str | None = None,
        substitutions: bool = False,
        relatives: Relatives | None = None,
        batch_tokens: int = 8192,
        progress: Progress | None = None,
    ) -> list[ProteinScore]:
        """Log-likelihood of each residue, and log-odds of substitutions; see `score_sequences`.

        Args:
            proteins: Sequences of residues, or records.
            method: Of a masked model: ``"masked"`` (by default) or ``"one-pass"``.
            substitutions: Compute log-odds of all substitutions.
            relatives: Relatives to read them with, see `relatives`.
            batch_tokens: Tokens in a batch, padding included.
            progress: Called with the residues done and the residues in all, after each protein.

        Returns:
            A score for each protein, in order.

        Raises:
            UserError: A protein is longer than the model can read or has no relatives, or
                ``method`` is unknown or given for a causal model.
            ValueError: A sequence has other letters than residues.
        """
        records = _records(proteins)
        return score_sequences(
            self.network,
            self.tokenizer,
            [record.sequence for record in records],
            method=method,
            substitutions=substitutions,
            relatives=None if relatives is None else relatives.rows(records),
            batch_tokens=batch_tokens,
            progress=progress,
        )

    def variant_scorer(
        self,
        protein: str | ProteinRecord,
        *,
        relatives: Relatives | None = None,
        method: str | None = None,
        batch_tokens: int = 8192,
    ) -> VariantScorer:
        """Scorer of substitutions in a protein; see `VariantScorer`, and `score` for errors."""
        records = _records([protein])
        return VariantScorer(
            self.network,
            self.tokenizer,
            records[0].sequence,
            relatives=None if relatives is None else relatives.rows(records),
            method=method,
            batch_tokens=batch_tokens,
        )

    def score_variants(
        self,
        protein: str | ProteinRecord,
        variants: Sequence[str],
        *,
        relatives: Relatives | None = None,
        method: str | None = None,
        batch_tokens: int = 8192,
    ) -> npt.NDArray[np.float64]:
        """Log-odds of variants of a protein, ``(variants,)``, nats; see `VariantScorer`.

        A variant is a substitution such as ``"A123V"``, or several, ``"A123V:G7D"``. The other
        arguments are those of `score`.

        Raises:
            UserError: As in `score`, or a variant is not one of the protein.
        """
        scorer = self.variant_scorer(
            protein, relatives=relatives, method=method, batch_tokens=batch_tokens
        )
        return scorer([parse_variant(variant) for variant in variants])


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> ProteinModel:
    """Load a protein language model, in evaluation mode.

    Args:
        path: A folder that ``performers train`` wrote, or a model that ships with the library:
            ``"performers-protein-small"``, the default, or ``"performers-protein-relatives"``,
            which reads a protein with relatives.
        device: Device of torch, such as ``"cpu"`` or ``"cuda:1"``; by default a CUDA device where
            there is one.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``; as saved by default.

    Raises:
        UserError: The folder holds no model or its files are damaged, or the device is not
            available.
    """
    folder = model_folder(PRETRAINED if path is None else path)
    return ProteinModel(*load_model(folder, device=device, dtype=dtype), folder)


def embed(
    proteins: Sequence[str | ProteinRecord],
    *,
    per_residue: bool = False,
    pooling: str = "mean",
    layer: int | None = None,
) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
    """Embed proteins with the model that ships, loaded once; see `ProteinModel.embed`."""
    return _shipped().embed(proteins, per_residue=per_residue, pooling=pooling, layer=layer)


def score(
    proteins: Sequence[str | ProteinRecord],
    *,
    method: str | None = None,
    substitutions: bool = False,
) -> list[ProteinScore]:
    """Score proteins with the model that ships, loaded once; see `ProteinModel.score`."""
    return _shipped().score(proteins, method=method, substitutions=substitutions)


@cache
def _shipped() -> ProteinModel:
    return load()


def _records(proteins: Sequence[str | ProteinRecord]) -> list[ProteinRecord]:
    if isinstance(proteins, str):
        raise ValueError("proteins: expected a list of sequences, got one string; put it in a list")
    records = []
    for number, protein in enumerate(proteins):
        record = protein
        if not isinstance(record, ProteinRecord):
            record = ProteinRecord(f"proteins[{number}]", "", record.upper())
        if not re.fullmatch("[A-Z]+", record.sequence):
            raise ValueError(
                f"proteins[{number}]: expected one or more letters from A to Z, got "
                f"{record.sequence[:30]!r}; remove gaps, stops and spaces"
            )
        records.append(record)
    if not records:
        raise ValueError("proteins: expected at least one sequence, got none")
    return records
