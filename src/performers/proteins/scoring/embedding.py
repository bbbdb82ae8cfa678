"""Embeddings: one vector a sequence."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.errors import UserError
from performers.app.files import write_atomically
from performers.app.progress import Progress
from performers.models.heads import mean_pool
from performers.proteins.inputs.fasta import ProteinRecord
from performers.proteins.inputs.objectives import CausalCollator
from performers.proteins.inputs.packing import LengthBucketedBatchSampler, TokenDataset
from performers.proteins.inputs.tokenizer import encode_sequences, residue_ids
from performers.proteins.model_folder import check_input_length
from performers.proteins.options import POOLINGS


def embed_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    pooling: str = "mean",
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """Mean of the final hidden states over a sequence's residues, and their spread if wanted.

    Every sequence is read whole, whatever its length: attention is linear. With ``pooling`` of
    ``"mean-sd"`` the mean of each hidden channel over the residues is followed by its standard
    deviation, ``sqrt(mean((h - mean(h))^2))``: a motif that a few residues form hardly moves a
    mean, but it widens the spread of the channels that see it. Source: statistics pooling, Snyder
    et al. 2018 (x-vectors).

    Args:
        model: A masked or causal language model with a Performer inside.
        tokenizer: Its tokenizer.
        sequences: Proteins as letters.
        pooling: One of ``POOLINGS``.
        batch_tokens: Tokens in a batch, padding included; a longer sequence is a batch of its own.
        progress: Called with the sequences done and the sequences in all, after each batch.

    Returns:
        Shape ``(sequences, hidden_size)``, twice as wide with ``"mean-sd"``, in the order given.

    Raises:
        UserError: The pooling is unknown, or a sequence is longer than learned positions reach.
    """
    if pooling not in POOLINGS:
        raise UserError(f"--pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
    dataset = TokenDataset(encode_sequences(tokenizer, sequences))
    check_input_length(model, int(dataset.lengths.max()))
    sampler = LengthBucketedBatchSampler(
        dataset.lengths, max_tokens=max(batch_tokens, int(dataset.lengths.max())), shuffle=False
    )
    collator = CausalCollator(tokenizer)
    residues = torch.from_numpy(residue_ids(tokenizer)).to(model.device)
    width = model.config.hidden_size * (2 if pooling == "mean-sd" else 1)
    vectors = np.empty((len(sequences), width), dtype=np.float32)
    done = 0
    for keys in sampler:
        batch = collator([dataset[key] for key in keys])
        input_ids = batch["input_ids"].to(model.device)
        attention_mask = batch["attention_mask"].to(model.device)
        with torch.inference_mode():
            output = model.base_model(input_ids, attention_mask, use_cache=False)
            hidden = output.last_hidden_state.float()
            taking_part = torch.isin(input_ids, residues)
            pooled = mean_pool(hidden, taking_part)
            if pooling == "mean-sd":
                variance = mean_pool((hidden - pooled[:, None]).square(), taking_part)
                pooled = torch.cat([pooled, variance.sqrt()], dim=-1)
        vectors[[index for _, index in keys]] = pooled.cpu().numpy()
        done += len(keys)
        if progress is not None:
            progress(done, len(dataset))
    return vectors


def write_embeddings(
    path: Path, records: Sequence[ProteinRecord], vectors: npt.NDArray[np.float32]
) -> None:
    r"""Write names, lengths and vectors, whole or not at all.

    An array of strings would take the longest name's space for every name. In ``.npz`` the names
    are therefore one text, a name a line, as an array of bytes in UTF-8::

        with np.load("proteins.npz") as file:
            names = file["names"].tobytes().decode().split("\n")
            vectors = file["embeddings"]

    Args:
        path: ``.npz`` with arrays ``names`` (uint8), ``lengths`` (int64) and ``embeddings``
            (float32), or ``.parquet`` with columns ``name``, ``length`` and ``embedding`` (a list
            of float32).
        records: The sequences, in the order of the vectors.
        vectors: Shape ``(sequences, width)``.

    Raises:
        ValueError: A name has a line break in it.
    """
    names = [record.name for record in records]
    if broken := [name for name in names if "\n" in name]:
        raise ValueError(
            f"records: expected names of one line, got {broken[0]!r}; rename the record"
        )
    lengths = np.array([len(record.sequence) for record in records], dtype=np.int64)
    buffer = BytesIO()
    if path.suffix.lower() == ".npz":
        text = np.frombuffer("\n".join(names).encode(), dtype=np.uint8)
        np.savez(buffer, names=text, lengths=lengths, embeddings=vectors)
    else:
        import pyarrow
        from pyarrow import parquet

        embedding = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(vectors.ravel()), vectors.shape[1]
        )
        table = pyarrow.table(
            {"name": pyarrow.array(names), "length": pyarrow.array(lengths), "embedding": embedding}
        )
        parquet.write_table(table, buffer)
    write_atomically(path, buffer.getvalue())
