"""Embeddings: hidden states of residues, and one vector a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.errors import UserError
from performers.app.progress import Progress
from performers.models.heads import mean_pool
from performers.proteins.inputs.objectives import CausalCollator
from performers.proteins.inputs.packing import TokenDataset
from performers.proteins.inputs.relatives import RelativesRows
from performers.proteins.inputs.tokenizer import encode_sequences, residue_ids
from performers.proteins.options import POOLINGS
from performers.proteins.scoring.batches import run_batches


def embed_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    pooling: str = "mean",
    **options: Any,
) -> npt.NDArray[np.float32]:
    """Mean of the final hidden states over a sequence's residues, and their spread if wanted.

    Every sequence is read whole, whatever its length: attention is linear. With ``pooling`` of
    ``"mean-sd"`` the mean of each hidden channel over the residues is followed by its standard
    deviation, ``sqrt(mean((h - mean(h))^2))``: a motif that a few residues form hardly moves a
    mean, but it widens the spread of the channels that see it. Source: statistics pooling, Snyder
    et al. 2018 (x-vectors). The other options are those of `hidden_states`.

    Returns:
        Shape ``(sequences, hidden_size)``, twice as wide with ``"mean-sd"``, in the order given.

    Raises:
        UserError: The pooling or the layer is unknown, or a sequence is longer than learned
            positions reach.
    """
    if pooling not in POOLINGS:
        raise UserError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
    width = model.config.hidden_size * (2 if pooling == "mean-sd" else 1)
    vectors = np.empty((len(sequences), width), dtype=np.float32)
    for places, hidden, residues in hidden_states(model, tokenizer, sequences, **options):
        pooled = mean_pool(hidden, residues)
        if pooling == "mean-sd":
            variance = mean_pool((hidden - pooled[:, None]).square(), residues)
            pooled = torch.cat([pooled, variance.sqrt()], dim=-1)
        vectors[places] = pooled.cpu().numpy()
    return vectors


def embed_residues(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    **options: Any,
) -> list[npt.NDArray[np.float32]]:
    """Hidden states of the residues of each sequence, ``(residues, hidden_size)``.

    The options are those of `hidden_states`.
    """
    vectors: dict[int, npt.NDArray[np.float32]] = {}
    for places, hidden, residues in hidden_states(model, tokenizer, sequences, **options):
        for row, place in enumerate(places):
            vectors[place] = hidden[row][residues[row]].cpu().numpy()
    return [vectors[place] for place in range(len(sequences))]


def hidden_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    layer: int | None = None,
    relatives: RelativesRows | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Hidden states of sequences, a batch at a time; the arguments are those of ``embed``.

    With ``relatives``, rows in which the sequences are read after relatives, the mask is of the
    sequences' own residues.

    Yields:
        Places of a batch's sequences, their hidden states in float32, and a mask of the residues.

    Raises:
        UserError: The layer is unknown, or a sequence is longer than learned positions reach.
    """
    layers = model.config.num_hidden_layers
    if layer is not None and not -layers - 1 <= layer <= layers:
        raise UserError(
            f"layer must be 0 (before the first block) to {layers} (after the last), or "
            f"{-layers - 1} to -1 from the end; got {layer}"
        )
    inner = layer is not None and layer not in (-1, layers)
    letters = torch.from_numpy(residue_ids(tokenizer)).to(model.device)
    for places, batch, output in run_batches(
        model.base_model,
        relatives or TokenDataset(encode_sequences(tokenizer, sequences)),
        CausalCollator(tokenizer),
        batch_tokens=batch_tokens,
        progress=progress,
        output_hidden_states=inner,
    ):
        hidden = output.hidden_states[layer] if inner else output.last_hidden_state
        residues = torch.isin(batch["input_ids"], letters)
        if relatives is not None:
            starts = torch.from_numpy(relatives.starts[places]).to(model.device)
            place = torch.arange(residues.shape[1], device=model.device)
            residues &= place >= starts.unsqueeze(1)
        yield places, hidden.float(), residues
