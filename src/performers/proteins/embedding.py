"""One vector a sequence."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.models.heads import mean_pool
from performers.proteins.fasta import ProteinRecord
from performers.proteins.folders import write_atomically
from performers.proteins.model_folder import check_input_length
from performers.proteins.objectives import CausalCollator
from performers.proteins.packing import LengthBucketedBatchSampler, TokenDataset
from performers.proteins.tokenizer import encode_sequences, residue_ids


def embed_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[str],
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Mean of the final hidden states over a sequence's residues.

    Every sequence is read whole, whatever its length: attention is linear.

    Args:
        model: A masked or causal language model with a Performer inside.
        tokenizer: Its tokenizer.
        sequences: Proteins as letters.
        batch_tokens: Tokens in a batch, padding included; a longer sequence is a batch of its own.
        progress: Called with the sequences done and the sequences in all, after each batch.

    Returns:
        Shape ``(sequences, hidden_size)``, in the order given.

    Raises:
        UserError: A sequence is longer than learned positions reach.
    """
    dataset = TokenDataset(encode_sequences(tokenizer, sequences))
    check_input_length(model, int(dataset.lengths.max()))
    sampler = LengthBucketedBatchSampler(
        dataset.lengths, max_tokens=max(batch_tokens, int(dataset.lengths.max())), shuffle=False
    )
    collator = CausalCollator(tokenizer)
    residues = torch.from_numpy(residue_ids(tokenizer)).to(model.device)
    vectors = np.empty((len(sequences), model.config.hidden_size), dtype=np.float32)
    done = 0
    for keys in sampler:
        batch = collator([dataset[key] for key in keys])
        input_ids = batch["input_ids"].to(model.device)
        attention_mask = batch["attention_mask"].to(model.device)
        with torch.inference_mode():
            output = model.base_model(input_ids, attention_mask, use_cache=False)
            pooled = mean_pool(output.last_hidden_state.float(), torch.isin(input_ids, residues))
        vectors[[index for _, index in keys]] = pooled.cpu().numpy()
        done += len(keys)
        if progress is not None:
            progress(done, len(dataset))
    return vectors


def write_embeddings(
    path: Path, records: Sequence[ProteinRecord], vectors: npt.NDArray[np.float32]
) -> None:
    """Write names, lengths and vectors, whole or not at all.

    Args:
        path: ``.npz`` with arrays ``names``, ``lengths`` and ``embeddings``, or ``.parquet`` with
            columns ``name``, ``length`` and ``embedding`` (a list of float32).
        records: The sequences, in the order of the vectors.
        vectors: Shape ``(sequences, width)``.
    """
    names = [record.name for record in records]
    lengths = np.array([len(record.sequence) for record in records], dtype=np.int64)
    buffer = BytesIO()
    if path.suffix.lower() == ".npz":
        np.savez(buffer, names=np.array(names), lengths=lengths, embeddings=vectors)
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
