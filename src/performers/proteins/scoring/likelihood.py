"""Log-likelihoods of residues, and log-odds of substitutions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.errors import UserError
from performers.app.progress import Progress
from performers.proteins.inputs.objectives import CausalCollator
from performers.proteins.inputs.packing import TokenDataset
from performers.proteins.inputs.relatives import RelativesRows
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, encode_sequences, residue_ids
from performers.proteins.model_folder import check_input_length
from performers.proteins.options import SCORE_METHODS
from performers.proteins.scoring.batches import evaluation_mode, run_batches

_Floats = npt.NDArray[np.float64]
_Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ProteinScore:
    """Score of a protein under a model.

    Attributes:
        log_likelihoods: Log-probability of each residue, ``(residues,)``, nats; over the whole
            vocabulary of the model, as ``performers evaluate`` has it.
        log_odds: Log-odds of each of the 20 amino acids, in the order ``ACDEFGHIKLMNPQRSTVWY``,
            against the residue that is there, ``(residues, 20)``: 0 for that residue, below 0 for
            what the model finds less likely, NaN where the residue is none of the 20. None unless
            asked for.
    """

    log_likelihoods: _Floats
    log_odds: _Floats | None = None

    @property
    def log_likelihood(self) -> float:
        """Sum over the residues; of a masked model a pseudo-log-likelihood."""
        return float(self.log_likelihoods.sum())

    @property
    def mean(self) -> float:
        """Mean over the residues."""
        return float(self.log_likelihoods.mean())

    @property
    def perplexity(self) -> float:
        """``exp(-mean)``; infinity where that is too large."""
        return math.exp(-self.mean) if self.mean > -700 else math.inf


def score_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    method: str | None = None,
    substitutions: bool = False,
    relatives: RelativesRows | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[ProteinScore]:
    """Score proteins residue by residue.

    - A causal model gives the exact ``log p(x_i | x_<i)``; log-odds of a substitution compare the
      whole protein with and without it, and take 19 runs of the model a residue.
    - A masked model with ``"masked"`` gives ``log p(x_i | x without i)``, each residue hidden by
      itself, a run of the model a residue; log-odds are of the same distributions (masked
      marginals, Meier et al. 2021). Their sum is the pseudo-log-likelihood of Salazar et al. 2020.
    - With ``"one-pass"`` no residue is hidden and one run serves all. The model sees what it is
      asked for, which flatters the likelihoods; they compare proteins read in the same way only.

    The end of a protein is not scored.

    Args:
        model: A masked or causal language model.
        tokenizer: Its tokenizer.
        sequences: Proteins as letters.
        method: One of ``SCORE_METHODS``; of masked models alone, ``"masked"`` by default.
        substitutions: Compute log-odds.
        relatives: Rows in which the sequences are read after relatives, which stay in sight.
        batch_tokens: Tokens in a batch, padding included.
        progress: Called with the residues done and the residues in all, after each protein.

    Returns:
        A score for each sequence, in the order given.

    Raises:
        UserError: The method is unknown or given for a causal model, a sequence is longer than
            learned positions reach, or the model gives values that are not finite.
    """
    causal = bool(model.config.is_decoder)
    check_method(model, method)
    scorer = RowScorer(model, tokenizer, batch_tokens)
    encoded = [tokens.astype(np.int64) for tokens in encode_sequences(tokenizer, sequences)]
    rows = TokenDataset(encoded) if relatives is None else relatives
    check_input_length(model, int(rows.lengths.max()))
    total = sum(map(len, sequences))
    scores: dict[int, ProteinScore] = {}
    done = 0
    hidden = not causal and method != "one-pass"
    for place, predicted in scorer.predictions(encoded, relatives, hidden=hidden):
        residues = encoded[place][1:-1]
        own = _taken(predicted, residues)
        check_finite(own)
        log_odds = None
        if substitutions and causal:
            before = Before.of_row(relatives, place)
            log_odds = scorer.against_mutants(encoded[place], before, float(own.sum()))
        elif substitutions:
            log_odds = predicted[:, scorer.amino_acids] - own[:, None]
            log_odds[~np.isin(residues, scorer.amino_acids)] = np.nan
        scores[place] = ProteinScore(own, log_odds)
        done += len(own)
        if progress is not None:
            progress(done, total)
    return [scores[place] for place in range(len(encoded))]


def check_finite(values: _Floats) -> None:
    """Check the numbers of a model.

    Raises:
        UserError: One is not finite.
    """
    if not np.isfinite(values).all():
        raise UserError(
            "the model gives log-likelihoods that are not finite; its training diverged, or its "
            "files are damaged: train anew or copy it again"
        )


def check_method(model: PreTrainedModel, method: str | None) -> None:
    """Check the method of scoring a residue.

    Raises:
        UserError: The method is unknown or given for a causal model.
    """
    if method is not None and model.config.is_decoder:
        raise UserError("method is for masked models; leave it out with a causal one")
    if method is not None and method not in SCORE_METHODS:
        raise UserError(f"method must be one of {', '.join(SCORE_METHODS)}; got {method!r}")


class Before(NamedTuple):
    """Tokens of relatives that a protein is read after.

    Attributes:
        tokens: Shape ``(tokens,)``.
        positions: Positions of these and of the protein's own tokens.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]

    @classmethod
    def of_row(cls, relatives: RelativesRows | None, row: int) -> Before | None:
        """Those of a row; None without relatives."""
        if relatives is None:
            return None
        example = relatives[row]
        tokens = example["input_ids"][: relatives.starts[row]].astype(np.int64)
        return cls(tokens, example["position_ids"])


class RowScorer:
    """Runs of a model on rows of tokens, at most ``batch_tokens`` tokens at a time."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int
    ) -> None:
        self.model = model
        self.batch_tokens = batch_tokens
        self.amino_acids = residue_ids(tokenizer, AMINO_ACIDS)
        self._collator = CausalCollator(tokenizer)
        self._mask_id = tokenizer.mask_token_id

    def predictions(
        self, encoded: Sequence[_Tokens], relatives: RelativesRows | None, *, hidden: bool
    ) -> Iterator[tuple[int, _Floats]]:
        """Place of each protein and log-probabilities of its residues, ``(residues, vocabulary)``.

        They are from predictions at residues that are hidden one at a time, or, not hidden, at the
        residues themselves (of a masked model) or those before them (of a causal one).
        """
        if hidden:
            for place, tokens in enumerate(encoded):
                before = Before.of_row(relatives, place)
                yield place, self.hidden(tokens, np.arange(1, len(tokens) - 1), before)
            return
        rows = TokenDataset(encoded) if relatives is None else relatives
        for places, _, output in run_batches(
            self.model, rows, self._collator, batch_tokens=self.batch_tokens
        ):
            for row, place in enumerate(places):
                # The residues are tokens 1 to -1.
                start = 0 if self.model.config.is_decoder else 1
                start += 0 if relatives is None else int(relatives.starts[place])
                own = output.logits[row, start : start + len(encoded[place]) - 2]
                yield place, _log_probabilities(own)

    def hidden(
        self, tokens: _Tokens, places: npt.NDArray[np.int64], before: Before | None
    ) -> _Floats:
        """Log-probabilities at tokens that are hidden one at a time, ``(places, vocabulary)``."""
        parts = []
        for part in self._parts(len(places), tokens, before):
            rows = _changed(tokens, places[part], self._mask_id)
            logits = self._logits(rows, before)[np.arange(len(rows)), places[part]]
            parts.append(_log_probabilities(logits))
        return np.concatenate(parts)

    def in_sight(self, tokens: _Tokens, before: Before | None) -> _Floats:
        """Log-probabilities at tokens none of which is hidden, ``(tokens, vocabulary)``."""
        return _log_probabilities(self._logits(tokens[None], before)[0])

    def log_likelihoods(self, rows: _Tokens, before: Before | None) -> _Floats:
        """Log-likelihood of each row ``(rows, tokens)`` under a causal model, its end left out."""
        found = np.empty(len(rows))
        for part in self._parts(len(rows), rows[0], before):
            predicted = _log_probabilities(self._logits(rows[part], before)[:, :-2])
            taken = np.take_along_axis(predicted, rows[part][:, 1:-1, None], axis=2)
            found[part] = taken.sum((1, 2))
        return found

    def against_mutants(self, tokens: _Tokens, before: Before | None, wild_type: float) -> _Floats:
        """Log-likelihoods of all single mutants less that of the protein, ``(residues, 20)``."""
        residues = tokens[1:-1, None]
        odds = np.where(residues == self.amino_acids, 0.0, np.nan)
        standard = (odds == 0).any(1, keepdims=True)
        cells = np.argwhere(standard & (residues != self.amino_acids))
        for part in self._parts(len(cells), tokens, before):
            place, letter = cells[part].T
            rows = _changed(tokens, place + 1, self.amino_acids[letter])
            odds[place, letter] = self.log_likelihoods(rows, before) - wild_type
        return odds

    def _parts(self, count: int, tokens: _Tokens, before: Before | None) -> Iterator[slice]:
        """Slices of so many rows, each of them a batch."""
        length = len(tokens) if before is None else len(before.positions)
        size = max(1, self.batch_tokens // length)
        return (slice(start, start + size) for start in range(0, count, size))

    def _logits(self, rows: _Tokens, before: Before | None) -> Tensor:
        """Logits at the tokens of rows of one length, each read after the same relatives."""
        options: dict[str, Any] = {"use_cache": False} if self.model.config.is_decoder else {}
        own = slice(None)
        if before is not None:
            own = slice(len(before.tokens), None)
            ahead = np.repeat(before.tokens[None], len(rows), axis=0)
            rows = np.concatenate((ahead, rows), axis=1)
            positions = np.repeat(before.positions[None], len(rows), axis=0)
            options["position_ids"] = torch.from_numpy(positions).to(self.model.device)
            # Without a mask, positions that restart are those of packed sequences.
            options["attention_mask"] = torch.ones_like(options["position_ids"])
        with evaluation_mode(self.model):
            found = self.model(torch.from_numpy(rows).to(self.model.device), **options)
            return found.logits[:, own]


def _log_probabilities(logits: Tensor) -> _Floats:
    # Not every device has float64.
    return logits.cpu().double().log_softmax(-1).numpy()


def _taken(predicted: _Floats, tokens: npt.NDArray[np.int64]) -> _Floats:
    """Entries of each row at a token, ``(rows,)``."""
    return np.take_along_axis(predicted, tokens[:, None], axis=1)[:, 0]


def _changed(
    tokens: _Tokens, places: npt.NDArray[np.int64], instead: int | npt.NDArray[np.int64]
) -> _Tokens:
    """A copy of the tokens for each place, with another token there, ``(places, tokens)``."""
    rows = np.repeat(tokens[None], len(places), axis=0)
    rows[np.arange(len(places)), places] = instead
    return rows
