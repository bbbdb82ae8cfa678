"""Data of a study: the embedded proteins, or a corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from performers.app.progress import Report
from performers.proteins.corpus import Corpus, TokenShards
from performers.proteins.embedded import embedded_fasta
from performers.proteins.inputs.fasta import read_fasta
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences
from performers.proteins.training.train import validation_sample

SCORED_SPLITS = ("test", "ood")
_VALIDATION_AT_MOST = 500
_Item = TypeVar("_Item")


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

    def scores(
        self, score: Callable[[list[str]], dict[str, Any]], report: Report, name: str
    ) -> dict[str, dict[str, Any]]:
        """Scores of the sequences of each split."""
        found = {}
        for number, (split, records) in enumerate(self.scored.items()):
            report(f"scoring {name}", number, len(self.scored), {})
            found[split] = score([record.sequence for record in records])
        report(f"scoring {name}", len(self.scored), len(self.scored), {})
        return found


def embedded_data(scored: int) -> StudyData:
    """The proteins embedded in the package: 15 families, and 5 that are held out."""
    records = {
        name: read_fasta(embedded_fasta(name))[0]
        for name in ("train", "validation", *SCORED_SPLITS)
    }
    return StudyData(
        "embedded families of Swiss-Prot",
        [record.sequence for record in records["train"]],
        [record.sequence for record in _drawn(records["validation"], _VALIDATION_AT_MOST)],
        {name: _drawn(records[name], scored) for name in SCORED_SPLITS},
        {"data": "embedded", "scored": scored},
    )


def corpus_data(folder: Path, scored: int) -> StudyData:
    """The splits of a folder that ``performers data`` wrote.

    Raises:
        UserError: It is not a corpus.
    """
    corpus = Corpus(folder)
    train = corpus.split("train")
    tests: dict[str, list[ProteinRecord]] = {}
    for name in SCORED_SPLITS:
        shards = corpus.split(name)
        tests[name] = [
            ProteinRecord(shards.names[index], "", shards.sequence(index))
            for index in _drawn(range(len(shards)), scored)
        ]
    return StudyData(
        folder.name,
        train,
        validation_sample(corpus.split("validation"), seed=0),
        tests,
        {"data": train.fingerprint(), "scored": scored},
    )


def _drawn(items: Sequence[_Item], count: int) -> list[_Item]:
    order = np.random.default_rng(0).permutation(len(items))[:count]
    return [items[index] for index in sorted(order.tolist())]
