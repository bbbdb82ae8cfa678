"""Held-out proteins with hidden residues and relatives, the same for alignments and models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from performers.proteins.corpus import Corpus
from performers.proteins.embedded import embedded_fasta
from performers.proteins.inputs.families import FamilyRows, ProteinFamilies, header_families
from performers.proteins.inputs.fasta import iter_fasta
from performers.proteins.inputs.objectives import ALL_HIDDEN, IGNORE_INDEX, MaskedCollator
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences

TOKENIZER = build_protein_tokenizer(closed=True)
_LONGEST_ROW = 1 << 17


@dataclass(frozen=True)
class Scored:
    """Proteins to score.

    Attributes:
        proteins: Proteins of held-out families.
        relatives: Most relatives of one; all families have more members.
        indices: Those of ``proteins`` that are scored, in order.
        seed: Seed of the hidden residues and of the choice of relatives.
    """

    proteins: ProteinFamilies
    relatives: int
    indices: tuple[int, ...]
    seed: int

    def rows(self, relatives: int) -> FamilyRows:
        """Rows of all proteins; the relatives of fewer are among those of more."""
        return FamilyRows(
            self.proteins,
            max_length=_LONGEST_ROW,
            hidden="one",
            max_relatives=relatives,
            seed=self.seed,
        )

    def collator(self) -> MaskedCollator:
        """Hides 15% of the residues of the protein itself."""
        return MaskedCollator(TOKENIZER, seed=self.seed, replaced=ALL_HIDDEN)

    def letters(self, index: int) -> tuple[list[str], str, dict[int, str]]:
        """Relatives, nearest to the end first, the protein with ``X``, and its hidden residues."""
        batch = self.collator()([self.rows(self.relatives)[index]])
        tokens, labels = batch["input_ids"][0], batch["labels"][0]
        starts = (tokens == TOKENIZER.bos_token_id).nonzero().flatten().tolist()
        pieces = tokens.tensor_split(starts[1:])
        texts = [TOKENIZER.decode(piece[1:-1]).replace("<mask>", "X") for piece in pieces]
        own = labels[starts[-1] + 1 : -1]
        places = (own != IGNORE_INDEX).nonzero().flatten().tolist()
        return texts[-2::-1], texts[-1], {p: TOKENIZER.decode(own[p : p + 1]) for p in places}


def draw_scored(
    proteins: ProteinFamilies, count: int, relatives: int, longest: int, seed: int
) -> Scored:
    """Draw proteins, of families that have more than ``relatives`` members.

    Proteins are drawn from the families in turns, so that a large family has no more than others.

    Raises:
        ValueError: No protein has as many relatives.
    """
    random = np.random.default_rng(seed)
    fits = [index for index, tokens in enumerate(proteins.tokens) if len(tokens) - 2 <= longest]
    kept = selected(proteins, fits)
    members: dict[str, list[int]] = {}
    for index, name in enumerate(kept.names):
        members.setdefault(name, []).append(index)
    large = [random.permutation(group) for group in members.values() if len(group) > relatives]
    if not large:
        raise ValueError(f"no family has more than {relatives} members of {longest} residues")
    turns = [group[turn] for turn in range(count) for group in large if turn < len(group)]
    return Scored(kept, relatives, tuple(int(index) for index in turns[:count]), seed)


def selected(proteins: ProteinFamilies, indices: Sequence[int]) -> ProteinFamilies:
    """Some of the proteins, in memory."""
    return ProteinFamilies(
        [np.array(proteins.tokens[index]) for index in indices],
        [proteins.names[index] for index in indices],
    )


def embedded_families() -> ProteinFamilies:
    """The families of the package that nothing in it was trained on."""
    records = list(iter_fasta(embedded_fasta("ood")))
    tokens = encode_sequences(TOKENIZER, [record.sequence for record in records])
    return ProteinFamilies(tokens, header_families(records))


def corpus_split(corpus: Corpus, split: str) -> ProteinFamilies:
    """Proteins of a split with their clusters."""
    tokens: Any = corpus.split(split)
    return ProteinFamilies(tokens, corpus.families(split))
