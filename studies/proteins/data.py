"""Data of a study: the embedded proteins, or a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from performers.proteins.corpus import Corpus, TokenShards
from performers.proteins.embedded import embedded_fasta
from performers.proteins.inputs.fasta import read_fasta
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences
from performers.proteins.training.train import validation_sample

SCORED_SPLITS = ("test", "ood")
_VALIDATION_AT_MOST = 500


@dataclass(frozen=True)
class StudyData:
    """Sequences of a study.

    Attributes:
        name: Name in tables.
        train: Training sequences.
        validation: Validation sequences.
        scored: Split to the records it is scored on: ``test``, drawn by sequence, and ``ood``,
            families or clusters held out whole.
        identity: Values that differ between data sets.
    """

    name: str
    train: Sequence[str] | TokenShards
    validation: Sequence[str]
    scored: dict[str, list[ProteinRecord]]
    identity: dict[str, Any]

    def row(self, tokens: int) -> npt.NDArray[np.int16]:
        """Training proteins one after another, always the same, over again if they are too few."""
        train = self.train
        sequence = train.sequence if isinstance(train, TokenShards) else train.__getitem__
        chosen: list[str] = []
        residues = 0
        for index in np.random.default_rng(0).permutation(len(train)).tolist():
            if residues >= tokens:
                break
            chosen.append(sequence(index))
            residues += len(chosen[-1])
        return np.resize(
            np.concatenate(encode_sequences(build_protein_tokenizer(), chosen)), tokens
        )


def embedded_data(scored: int, seed: int = 0) -> StudyData:
    """The proteins embedded in the package: 15 families, and 5 that are held out."""
    records = {
        name: read_fasta(embedded_fasta(name))[0]
        for name in ("train", "validation", *SCORED_SPLITS)
    }
    return StudyData(
        "embedded families of Swiss-Prot",
        [record.sequence for record in records["train"]],
        [record.sequence for record in _drawn(records["validation"], _VALIDATION_AT_MOST, seed)],
        {name: _drawn(records[name], scored, seed) for name in SCORED_SPLITS},
        {"data": "embedded", "scored": scored},
    )


def corpus_data(folder: Path, scored: int, seed: int = 0) -> StudyData:
    """The splits of a folder that ``performers data`` wrote.

    Raises:
        UserError: It is not a corpus.
    """
    corpus = Corpus(folder)
    train = corpus.split("train")
    tests: dict[str, list[ProteinRecord]] = {}
    for name in SCORED_SPLITS:
        shards = corpus.split(name)
        order = np.random.default_rng(seed).permutation(len(shards))[:scored]
        tests[name] = [
            ProteinRecord(shards.names[index], "", shards.sequence(index))
            for index in sorted(order.tolist())
        ]
    return StudyData(
        folder.name,
        train,
        validation_sample(corpus.split("validation"), seed),
        tests,
        {"data": train.fingerprint(), "scored": scored},
    )


def _drawn(records: list[ProteinRecord], count: int, seed: int) -> list[ProteinRecord]:
    order = np.random.default_rng(seed).permutation(len(records))[:count]
    return [records[index] for index in sorted(order.tolist())]
