"""Folders of trained models, recognised before they are loaded."""

from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from performers.app.errors import UserError, bare_exceptions
from performers.app.files import read_json

# Importing the models registers them with the Auto classes.
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.models.manifest import check_manifest
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, residue_ids
from performers.proteins.options import DTYPES
from performers.training.environment import available_device, quiet_transformers

_MOST_LETTERS = 64
"""Tokens of a tokenizer of proteins at most: letters, and those for special places."""


def load_model(
    folder: Path, *, device: str | None = None, dtype: str | None = None, of_text: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a protein language model, or one of text, and its tokenizer, in eval mode.

    Args:
        folder: A folder that ``performers train`` wrote.
        device: Device of torch; by default a CUDA device where there is one.
        dtype: One of ``DTYPES``; as saved by default.
        of_text: Load a model of text and refuse one of proteins, and not the reverse.

    Returns:
        The model, masked or causal as it was trained, and the tokenizer.

    Raises:
        UserError: The folder holds no model, its files do not fit together, or they are not those
            that its manifest lists; the device is not available, or the type unknown.
    """
    place = available_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a model folder; give one that performers train wrote to --output"
        )
    if not (folder / "config.json").exists():
        hint = "it has no config.json"
        if (folder / "checkpoints").is_dir():
            hint = "its training has not ended; finish it with performers train --resume"
        raise UserError(f"{folder} is not a model folder: {hint}")
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != PerformerConfig.model_type:
        raise UserError(
            f"{folder} holds a model of type {kind!r}, expected {PerformerConfig.model_type!r}; "
            "give a folder that performers train wrote"
        )
    model_class: type[PreTrainedModel] = PerformerForMaskedLM
    if settings.get("architectures") == [PerformerForCausalLM.__name__]:
        model_class = PerformerForCausalLM
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; copy the folder again or train anew")
    try:
        check_manifest(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            tokenizer = _load_tokenizer(folder, of_text)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{folder} cannot be loaded as a model ({reason[:300]}); copy it again or train anew"
        ) from error
    odd = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if odd:
        raise UserError(
            f"{folder} has weights that do not fit its config.json ({len(odd)} missing or too "
            f"many, such as {odd[0]}); copy it again or train anew"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{folder} has a tokenizer of {len(tokenizer)} tokens but a model of "
            f"{model.config.vocab_size}; their files do not belong together"
        )
    return model.to(place, getattr(torch, dtype) if dtype else None).eval(), tokenizer


def _load_tokenizer(folder: Path, of_text: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer that reads each amino acid as one token, or one of text.

    Raises:
        ValueError: The tokenizer cannot be read, or splits differently.
        UserError: It is of the other kind.
    """
    with bare_exceptions("tokenizer.json"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # A tokenizer of proteins knows few letters; one of bytes has no token for a sequence's end.
    is_text = tokenizer.eos_token_id is None or len(tokenizer) > _MOST_LETTERS
    if is_text and not of_text:
        raise UserError(
            f"{folder} is a model of text: performers evaluate reads it with .txt files, and "
            "transformers with AutoModelForCausalLM; this command reads proteins"
        )
    if of_text:
        if not is_text:
            raise UserError(f"{folder} is a model of proteins; give FASTA files, or another model")
        return tokenizer
    expected = residue_ids(tokenizer)[: len(AMINO_ACIDS)].tolist()
    read = tokenizer(AMINO_ACIDS, add_special_tokens=False)["input_ids"]
    if read != expected:
        raise ValueError(f"tokenizer.json: {AMINO_ACIDS} is read as {read}, expected {expected}")
    return tokenizer


def check_input_length(model: PreTrainedModel, tokens: int) -> None:
    """Check that a model can read so many tokens at once.

    Raises:
        UserError: Its learned positions, or its attention, end before.
    """
    # Models of other families say nothing here, and refuse by themselves what they cannot read.
    longest = getattr(model.config, "longest_input", None)
    if longest is None or tokens <= longest:
        return
    if model.config.has_position_table:
        what, instead = "learned positions", "with --positions rotary"
    else:
        what = f"{model.config.attention} attention"
        instead = "with a larger --max-length or another --attention"
    raise UserError(
        f"the model has {what} for {longest} tokens and cannot read {tokens}; "
        f"shorten the sequences or lower --max-length, or train {instead}"
    )


def model_max_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Length in tokens that a model was trained at, from its tokenizer; 1024 if it tells none."""
    length = int(tokenizer.model_max_length)
    return length if length < 10**9 else 1024


def reads_families(folder: Path) -> bool:
    """True if the record of a model's training has rows of relatives."""
    record = folder / "training.json"
    return record.exists() and bool(read_json(record).get("options", {}).get("families"))
