"""Features that probes read: embeddings of a model, and baselines that they must beat.

The baselines are as strong as they come cheaply, since a handicapped one flatters the model: words
of amino acids enter as square roots of their shares, and all features hold the length, which a
mean over residues forgets.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.errors import UserError
from performers.app.progress import Report, part
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.probe.options import PROBE_FEATURES
from performers.proteins.scoring.embedding import embed_sequences

_KMERS = {"composition": 1, "dipeptides": 2, "tripeptides": 3}
# From here on a table of counts is mostly zeros.
_DENSE_COLUMNS = 1_000
# About the median of Swiss-Prot. A constant, so that no protein's features depend on the others.
_USUAL_LENGTH = 300


def probe_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    features: Sequence[str] = PROBE_FEATURES,
    pooling: str = "mean",
    batch_tokens: int = 8192,
    seed: int = 0,
    report: Report | None = None,
) -> dict[str, Any]:
    """Compute features of proteins: those of a model and the baselines.

    - `"embeddings"`: the model's, see `embed_sequences` for `pooling`;
    - `"random-weights"`: the same of `untrained` with `seed`;
    - `"composition"`, `"dipeptides"`, `"tripeptides"`: √p of the shares p of `kmer_frequencies`,
      k 1 to 3. The inner product of two proteins is then the Bhattacharyya coefficient Σ √(p q):
      frequent words do not drown the rare ones.

    `report` is called with a name, the sequences done and the sequences in all.

    Returns:
        Name to a matrix (sequences, width), a SciPy sparse one for tripeptides. The last column of
        each is `log_lengths`.

    Raises:
        UserError: The model gives values that are not finite.
    """
    lengths = log_lengths(sequences)
    found: dict[str, Any] = {}
    for name in features:
        if name in _KMERS:
            found[name] = _beside(np.sqrt(kmer_frequencies(sequences, _KMERS[name])), lengths)
            continue
        source = model if name == "embeddings" else untrained(model, seed)
        embedded = embed_sequences(
            source,
            tokenizer,
            sequences,
            pooling=pooling,
            batch_tokens=batch_tokens,
            progress=part(report, f"computing {name}"),
        )
        if not np.isfinite(embedded).all():
            raise UserError(
                f"the {name} hold values that are not finite; the model's training diverged, or "
                "its files are damaged: train anew or copy it again"
            )
        found[name] = _beside(embedded, lengths)
    return found


def feature_notes(features: Sequence[str], seed: int = 0) -> tuple[str, ...]:
    """Remarks on the numbers that `probe_features` give."""
    notes = ["all features, embeddings included, hold the logarithm of the length besides"]
    if "random-weights" in features:
        notes.append(
            f"random-weights is one draw of weights (seed {seed}): how far another draw would "
            "score from it was not measured"
        )
    return tuple(notes)


def log_lengths(sequences: Sequence[str]) -> NDArray[np.float32]:
    """log(L / 300) of the L letters of each sequence, (sequences, 1).

    It is near 0, with a spread of about 0.7 over Swiss-Prot, beside rows of unit norm as it is.
    """
    lengths = np.array([max(len(sequence), 1) for sequence in sequences], dtype=np.float32)
    return np.asarray(np.log(lengths / np.float32(_USUAL_LENGTH)))[:, None]


def untrained(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same class and configuration with random weights, in evaluation mode."""
    # On the CPU, whose stream of random numbers is the same on every machine.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(copy.deepcopy(model.config))
    return fresh.to(device=model.device, dtype=model.dtype).eval()


def kmer_frequencies(sequences: Sequence[str], k: int) -> Any:
    """Share of each of the 20^k words of k amino acids among the words of a sequence.

    Words overlap. A word with another letter than the twenty amino acids is not counted; a
    sequence without any counted word has zeros.

    Returns:
        (sequences, 20^k) in the order of `AMINO_ACIDS`, the first letter most significant; a
        NumPy array of float32, or a SciPy CSR array of it from 1,000 columns on.
    """
    words = ["".join(letters) for letters in itertools.product(AMINO_ACIDS, repeat=k)]
    counter = CountVectorizer(
        analyzer="char", ngram_range=(k, k), lowercase=False, vocabulary=words, dtype=np.float64
    )
    counts = sparse.csr_array(counter.transform(sequences))
    shares = normalize(counts, norm="l1").astype(np.float32)
    return shares.toarray() if len(words) < _DENSE_COLUMNS else shares


def _beside(matrix: Any, column: NDArray[np.float32]) -> Any:
    """The matrix with one column more, sparse if it was."""
    if isinstance(matrix, np.ndarray):
        return np.hstack([matrix, column])
    return sparse.hstack([matrix, sparse.csr_array(column)], format="csr")
