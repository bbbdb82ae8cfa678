"""Log-likelihoods of residues, and log-odds of substitutions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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

    The end of a protein is not scored. The arguments are those of `ProteinModel.score`, with
    ``relatives`` as the rows in which the sequences are read.

    Raises:
        UserError: The method is unknown or given for a causal model, a sequence is longer than
            learned positions reach, or the model gives values that are not finite.
    """
    check_method(model, method)
    causal = bool(model.config.is_decoder)
    encoded = [tokens.astype(np.int64) for tokens in encode_sequences(tokenizer, sequences)]
    rows = TokenDataset(encoded) if relatives is None else relatives
    check_input_length(model, int(rows.lengths.max()))

    def runs_of(place: int) -> ProteinRuns:
        return ProteinRuns(model, tokenizer, encoded[place], relatives, place, batch_tokens)

    def all_in_sight() -> Iterator[tuple[int, _Floats]]:
        collator = CausalCollator(tokenizer)
        for places, _, output in run_batches(model, rows, collator, batch_tokens=batch_tokens):
            for row, place in enumerate(places):
                # The residues are tokens 1 to -1; a causal model predicts each a token before.
                start = 0 if causal else 1
                start += 0 if relatives is None else int(relatives.starts[place])
                own = output.logits[row, start : start + len(encoded[place]) - 2]
                yield place, _log_probabilities(own)

    predictions = all_in_sight()
    if not causal and method != "one-pass":
        predictions = (
            (place, runs_of(place).hidden(np.arange(1, len(tokens) - 1)))
            for place, tokens in enumerate(encoded)
        )
    amino_acids = residue_ids(tokenizer, AMINO_ACIDS)
    total = sum(map(len, sequences))
    scores: dict[int, ProteinScore] = {}
    done = 0
    for place, predicted in predictions:
        residues = encoded[place][1:-1]
        own = np.take_along_axis(predicted, residues[:, None], axis=1)[:, 0]
        check_finite(own)
        log_odds = None
        if substitutions and causal:
            log_odds = runs_of(place).against_mutants(float(own.sum()))
        elif substitutions:
            log_odds = predicted[:, amino_acids] - own[:, None]
            log_odds[~np.isin(residues, amino_acids)] = np.nan
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


class ProteinRuns:
    """Runs of a model on a protein and its mutants, at most ``batch_tokens`` tokens at a time.

    With relatives, those of a row, each run reads them before the protein.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: _Tokens,
        relatives: RelativesRows | None,
        row: int,
        batch_tokens: int,
    ) -> None:
        self._model, self._tokens = model, tokens
        self._amino_acids = residue_ids(tokenizer, AMINO_ACIDS)
        self._mask_id = tokenizer.mask_token_id
        self._before, self._positions = tokens[:0], None
        if relatives is not None:
            example = relatives[row]
            self._before = example["input_ids"][: relatives.starts[row]].astype(np.int64)
            self._positions = torch.from_numpy(example["position_ids"])
        self._rows_at_once = max(1, batch_tokens // (len(self._before) + len(tokens)))

    def hidden(self, places: _Tokens) -> _Floats:
        """Log-probabilities at tokens that are hidden one at a time, ``(places, vocabulary)``."""
        parts = []
        for part in self._parts(len(places)):
            rows = self._mutants(places[part], self._mask_id)
            logits = self._logits(rows)[np.arange(len(rows)), places[part]]
            parts.append(_log_probabilities(logits))
        return np.concatenate(parts)

    def in_sight(self) -> _Floats:
        """Log-probabilities at tokens none of which is hidden, ``(tokens, vocabulary)``."""
        return _log_probabilities(self._logits(self._tokens[None])[0])

    def log_likelihoods(self, rows: _Tokens) -> _Floats:
        """Log-likelihood of each row ``(rows, tokens)`` under a causal model, its end left out."""
        found = np.empty(len(rows))
        for part in self._parts(len(rows)):
            predicted = _log_probabilities(self._logits(rows[part])[:, :-2])
            taken = np.take_along_axis(predicted, rows[part][:, 1:-1, None], axis=2)
            found[part] = taken.sum((1, 2))
        return found

    def against_mutants(self, wild_type: float) -> _Floats:
        """Log-likelihoods of all single mutants less that of the protein, ``(residues, 20)``."""
        residues = self._tokens[1:-1, None]
        odds = np.where(residues == self._amino_acids, 0.0, np.nan)
        standard = (odds == 0).any(1, keepdims=True)
        cells = np.argwhere(standard & (residues != self._amino_acids))
        for part in self._parts(len(cells)):
            place, letter = cells[part].T
            rows = self._mutants(place + 1, self._amino_acids[letter])
            odds[place, letter] = self.log_likelihoods(rows) - wild_type
        return odds

    def _mutants(self, places: _Tokens, instead: int | _Tokens) -> _Tokens:
        """The protein for each place, with another token there, ``(places, tokens)``."""
        rows = np.repeat(self._tokens[None], len(places), axis=0)
        rows[np.arange(len(places)), places] = instead
        return rows

    def _parts(self, count: int) -> Iterator[slice]:
        """Slices of so many rows, each of them a batch."""
        size = self._rows_at_once
        return (slice(start, start + size) for start in range(0, count, size))

    def _logits(self, rows: _Tokens) -> Tensor:
        """Logits at the tokens of rows, ``(rows, tokens, vocabulary)``."""
        device = self._model.device
        options: dict[str, Any] = {"use_cache": False} if self._model.config.is_decoder else {}
        before = np.repeat(self._before[None], len(rows), axis=0)
        rows = np.concatenate((before, rows), axis=1)
        if self._positions is not None:
            options["position_ids"] = self._positions.repeat(len(rows), 1).to(device)
            # Without a mask, positions that restart are those of packed sequences.
            options["attention_mask"] = torch.ones_like(options["position_ids"])
        with evaluation_mode(self._model):
            found = self._model(torch.from_numpy(rows).to(device), **options)
            return found.logits[:, before.shape[1] :]


def _log_probabilities(logits: Tensor) -> _Floats:
    # Not every device has float64.
    return logits.cpu().double().log_softmax(-1).numpy()
