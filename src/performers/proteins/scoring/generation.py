"""New sequences from a causal model."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from performers.app.errors import UserError
from performers.proteins.inputs.fasta import ProteinRecord
from performers.proteins.inputs.tokenizer import AMBIGUOUS, AMINO_ACIDS
from performers.proteins.model_folder import check_input_length, quiet_transformers

# Beyond these, logits divided by the temperature are no longer finite or no longer differ.
_COLDEST, _HOTTEST = 1e-3, 1e3


def generate_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "",
    num_sequences: int = 1,
    max_length: int = 512,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[ProteinRecord]:
    """Sample sequences that begin with a prompt, until the model ends them.

    Only amino acids are sampled (the 20 standard ones), and an end only after the first residue.

    Args:
        model: A causal protein language model.
        tokenizer: Its tokenizer.
        prompt: First residues of every sequence; may be empty.
        num_sequences: How many.
        max_length: Most residues in a sequence, prompt included.
        temperature: Divides the logits; 0 takes the most likely residue each time.
        top_k: Sample from so many most likely residues only; 0 = all.
        top_p: Sample from the smallest set of residues with this probability only; 1 = all.
        seed: Of the sampling.
        batch_size: Sequences sampled together.
        progress: Called with the sequences done and the sequences in all, after each batch.

    Returns:
        Records named ``generated-1`` and on; a sequence cut at ``max_length`` says so in its
        description.

    Raises:
        UserError: The model is not causal, the prompt has other letters, or an option is out of
            range.
    """
    if not model.config.is_decoder:
        raise UserError(
            "the model predicts masked residues and cannot generate; give the folder of one that "
            "performers train --objective clm wrote"
        )
    prompt = "".join(prompt.split()).upper()
    illegal = sorted(set(prompt) - set(AMINO_ACIDS + AMBIGUOUS))
    if illegal:
        raise UserError(
            f"--prompt has letters that are not residues: {' '.join(illegal)}; use "
            f"{AMINO_ACIDS} (or {AMBIGUOUS})"
        )
    for name, value, low in (("--num", num_sequences, 1), ("--top-k", top_k, 0)):
        if value < low:
            raise UserError(f"{name} must be at least {low}, got {value}")
    if max_length <= len(prompt):
        raise UserError(
            f"--max-length must exceed the prompt's {len(prompt)} residues, got {max_length}"
        )
    if temperature != 0 and not _COLDEST <= temperature <= _HOTTEST:
        raise UserError(
            f"--temperature must be 0 or between {_COLDEST:g} and {_HOTTEST:g}, got {temperature}"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, got {top_p}")
    # What is fed back: <bos> and all residues but the last.
    check_input_length(model, max_length)
    set_seed(seed)
    residues = tokenizer.convert_tokens_to_ids(list(AMINO_ACIDS))
    never = sorted(set(range(model.config.vocab_size)) - {*residues, tokenizer.eos_token_id})
    tokens = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(list(prompt))]
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
    records: list[ProteinRecord] = []
    while len(records) < num_sequences:
        rows = min(batch_size, num_sequences - len(records))
        input_ids = torch.tensor([tokens] * rows, device=model.device)
        with torch.inference_mode(), quiet_transformers():
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_length - len(prompt),
                min_new_tokens=0 if prompt else 1,
                suppress_tokens=never,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
        for row in output:
            records.append(_record(tokenizer, row, len(records) + 1))
        if progress is not None:
            progress(len(records), num_sequences)
    return records


def _record(tokenizer: PreTrainedTokenizerBase, row: torch.Tensor, number: int) -> ProteinRecord:
    sequence = tokenizer.decode(row, skip_special_tokens=True)
    ended = bool((row == tokenizer.eos_token_id).any())
    description = f"length={len(sequence)}" + ("" if ended else " cut=max-length")
    return ProteinRecord(f"generated-{number}", description, sequence)
