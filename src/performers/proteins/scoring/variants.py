"""Log-odds of variants of a protein: substitutions, alone or several at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.errors import UserError
from performers.proteins.inputs.relatives import RelativesRows
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, encode_sequences, residue_ids
from performers.proteins.model_folder import check_input_length
from performers.proteins.scoring.likelihood import ProteinRuns, check_finite, check_method

_SUBSTITUTION = re.compile(r"([A-Za-z])([1-9][0-9]*)([A-Za-z])")


class Substitution(NamedTuple):
    """An amino acid in place of another.

    `position` counts from 1.
    """

    wild_type: str
    position: int
    mutant: str


def parse_variant(text: str) -> tuple[Substitution, ...]:
    """Read a variant such as ``A123V``, or ``A123V:G7D`` with several substitutions.

    Raises:
        UserError: The text is not of this form, an amino acid is none of the 20, or a position
            occurs twice.
    """
    found = []
    for part in text.split(":"):
        match = _SUBSTITUTION.fullmatch(part.strip())
        if match is None:
            raise UserError(
                f"{text!r} is not a variant; write substitutions as A123V, several with a colon "
                "between"
            )
        wild_type, position, mutant = match[1].upper(), int(match[2]), match[3].upper()
        odd = sorted({wild_type, mutant} - set(AMINO_ACIDS))
        if odd:
            raise UserError(f"{text!r} has {', '.join(odd)}, none of the 20 amino acids")
        found.append(Substitution(wild_type, position, mutant))
    if len({part.position for part in found}) < len(found):
        raise UserError(f"{text!r} changes a position twice")
    return tuple(found)


def check_variant(variant: Sequence[Substitution], sequence: str) -> None:
    """Check that a variant is one of a protein.

    Raises:
        UserError: A position is beyond the protein, or another residue is there.
    """
    for wild_type, position, mutant in variant:
        name = f"{wild_type}{position}{mutant}"
        if position > len(sequence):
            raise UserError(f"{name} is beyond the protein's {len(sequence):,} residues")
        if sequence[position - 1] != wild_type:
            raise UserError(
                f"{name} expects {wild_type} at position {position:,}, where the protein has "
                f"{sequence[position - 1]}; positions count from 1"
            )


class VariantScorer:
    """Log-odds of variants of one protein under a model.

    - Of a masked model: ``sum_i log p(mutant_i | x without i) - log p(wild type_i | x without i)``
      over the substitutions, each residue hidden by itself (masked marginals, Meier et al. 2021,
      with the additive model of several substitutions). Each position is read once.
    - With ``"one-pass"`` no residue is hidden and one run serves all (their wild-type marginals).
    - Of a causal model: ``log p(mutant) - log p(protein)``, a run of the model for each variant.

    Args:
        model: A masked or causal language model.
        tokenizer: Its tokenizer.
        sequence: The protein as letters.
        relatives: One row, in which it is read after relatives, which stay in sight.
        method: One of ``SCORE_METHODS``; of masked models alone, ``"masked"`` by default.
        batch_tokens: Tokens in a batch.

    Raises:
        UserError: The method is unknown or given for a causal model, or the protein is longer than
            the model can read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sequence: str,
        *,
        relatives: RelativesRows | None = None,
        method: str | None = None,
        batch_tokens: int = 8192,
    ) -> None:
        check_method(model, method)
        self._is_causal, self._method = bool(model.config.is_decoder), method
        self._sequence = sequence
        self._tokens = encode_sequences(tokenizer, [sequence])[0].astype(np.int64)
        length = len(self._tokens) if relatives is None else int(relatives.lengths[0])
        check_input_length(model, length)
        self._runs = ProteinRuns(model, tokenizer, self._tokens, relatives, 0, batch_tokens)
        ids = residue_ids(tokenizer, AMINO_ACIDS).tolist()
        self._ids = dict(zip(AMINO_ACIDS, ids, strict=True))
        self._predicted: dict[int, npt.NDArray[np.float64]] = {}

    def __call__(self, variants: Sequence[Sequence[Substitution]]) -> npt.NDArray[np.float64]:
        """Log-odds of each variant, ``(variants,)``, nats.

        Raises:
            UserError: A variant is not one of the protein, or the model gives values that are not
                finite.
        """
        for variant in variants:
            check_variant(variant, self._sequence)
        found = self._of_mutants(variants) if self._is_causal else self._of_residues(variants)
        check_finite(found)
        return found

    def _of_residues(self, variants: Sequence[Sequence[Substitution]]) -> npt.NDArray[np.float64]:
        missing = sorted(
            {part.position for variant in variants for part in variant} - self._predicted.keys()
        )
        if missing:
            places = np.array(missing)
            if self._method == "one-pass":
                predicted = self._runs.in_sight()[places]
            else:
                predicted = self._runs.hidden(places)
            self._predicted.update(zip(missing, predicted, strict=True))
        return np.array(
            [
                sum(
                    self._predicted[position][self._ids[mutant]]
                    - self._predicted[position][self._ids[wild_type]]
                    for wild_type, position, mutant in variant
                )
                for variant in variants
            ]
        )

    def _of_mutants(self, variants: Sequence[Sequence[Substitution]]) -> npt.NDArray[np.float64]:
        rows = np.repeat(self._tokens[None], len(variants), axis=0)
        for row, variant in zip(rows, variants, strict=True):
            for part in variant:
                row[part.position] = self._ids[part.mutant]
        return self._runs.log_likelihoods(rows) - self._of_protein

    @cached_property
    def _of_protein(self) -> float:
        return float(self._runs.log_likelihoods(self._tokens[None])[0])
