"""Sampling of new sequences from a causal model."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from performers.app.errors import UserError
from performers.app.progress import Progress
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.model_folder import check_input_length
from performers.proteins.options import SamplingOptions
from performers.proteins.scoring.batches import evaluation_mode
from performers.training.environment import quiet_transformers

_BATCH_SIZE = 32


def generate_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: SamplingOptions,
    *,
    progress: Progress | None = None,
) -> list[ProteinRecord]:
    """Sample sequences that begin with a prompt, until the model ends them.

    Only amino acids are sampled (the 20 standard ones), and an end only after the first residue.

    ``progress`` is called with the sequences done and the sequences in all, after each batch.

    Returns:
        Records named ``generated-1`` and on; a sequence cut at the maximal length says so in its
        description.

    Raises:
        UserError: The model is not causal, or cannot read so many tokens.
    """
    if not model.config.is_decoder:
        raise UserError(
            "the model predicts masked residues and cannot generate; give the folder of one that "
            "performers train --objective clm wrote"
        )
    # What is fed back: <bos> and all residues but the last.
    check_input_length(model, options.max_length)
    set_seed(options.seed)
    residues = tokenizer.convert_tokens_to_ids(list(AMINO_ACIDS))
    never = sorted(set(range(model.config.vocab_size)) - {*residues, tokenizer.eos_token_id})
    tokens = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(list(options.prompt))]
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
    records: list[ProteinRecord] = []
    while len(records) < options.num_sequences:
        rows = min(_BATCH_SIZE, options.num_sequences - len(records))
        input_ids = torch.tensor([tokens] * rows, device=model.device)
        with evaluation_mode(model), quiet_transformers():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=options.max_length - len(options.prompt),
                min_new_tokens=0 if options.prompt else 1,
                suppress_tokens=never,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        for row in output:
            sequence = tokenizer.decode(row, skip_special_tokens=True)
            ended = bool((row == tokenizer.eos_token_id).any())
            description = f"length={len(sequence)}" + ("" if ended else " cut=max-length")
            name = f"generated-{len(records) + 1}"
            records.append(ProteinRecord(name, description, sequence))
        if progress is not None:
            progress(len(records), options.num_sequences)
    return records
