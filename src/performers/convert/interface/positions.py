"""Extension of learned position embeddings."""

from typing import Any, TypeVar

import torch
from torch import nn

from performers.convert.sentences import transformer_of

Model = TypeVar("Model", bound=nn.Module)
# Names of the table in the families of BERT, of OPT and BART, of GPT-2, and in ours.
_TABLES = ("position_embeddings", "embed_positions", "wpe", "positions")
_CONFIG = "max_position_embeddings"


def learned_positions(model: nn.Module) -> int | None:
    """Maximum input length of a learned table of positions; None for a model without one."""
    sizes = [table.num_embeddings - _first(table) for _, table in _tables(model)]
    return min(sizes, default=None)


def extend_positions_(model: Model, length: int) -> Model:
    """Extend a model with a learned table of positions to longer inputs, in place.

    The table is repeated: position ``i`` beyond the trained ones starts from the vector of
    position ``i mod n``, which keeps the local order; training teaches the rest. The trained
    positions, and hence the outputs for shorter inputs, do not change. The configuration is changed
    with the table, so that the model is saved and loaded as usual. Source: Beltagy et al. 2020
    (arXiv 2004.05150), section 5. Stretching the table by interpolation found fewer documents of
    2,048 tokens (docs/results/long_documents.md).

    A model with rotary or relative positions needs no table and is not changed.

    Args:
        model: A transformers model, converted or not, or a model of sentence-transformers, whose
            ``max_seq_length`` is raised too; it is returned.
        length: Maximum number of tokens of an input.

    Raises:
        ValueError: ``length`` is below 1, or the positions are those of an image or another grid,
            sinusoidal, or of an encoder-decoder.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    inner = transformer_of(model)
    if inner is not model:
        extend_positions_(inner, length)
        whole: Any = model
        whole.max_seq_length = max(length, whole.max_seq_length or 0)
        return model
    now, tables, config = learned_positions(model), _tables(model), getattr(model, "config", None)
    if (reason := _not_extended(model, config)) is not None:
        raise ValueError(f"{type(model).__name__} {reason}")
    if now is None or length <= now:
        return model
    for name, table in tables:
        if "Sinusoidal" in type(table).__name__ or getattr(config, "sinusoidal_pos_embds", False):
            raise ValueError(
                f"{type(model).__name__} has sinusoidal positions ({name}), which are computed "
                f"and not repeated: build it with {_CONFIG}={length} instead"
            )
    if (before := getattr(config, _CONFIG, None)) is None:
        raise ValueError(
            f"{type(model).__name__} has no {_CONFIG} in its configuration, to be changed with it"
        )
    rows = {table.num_embeddings: length + _first(table) for _, table in tables}
    for _, table in tables:
        first, old = _first(table), table.weight
        repeated = torch.arange(length, device=old.device) % (len(old) - first) + first
        index = torch.cat((torch.arange(first, device=old.device), repeated))
        table.weight = nn.Parameter(old.detach()[index], requires_grad=old.requires_grad)
        table.num_embeddings = len(index)
    setattr(config, _CONFIG, before + length - now)
    for module in model.modules():
        _extend_buffers(module, rows)
    return model


def _not_extended(model: nn.Module, config: Any) -> str | None:
    """Reason why the positions of a model are no sequence that can be extended, or None."""
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder: extending its positions is not supported"
    for name, _ in model.named_parameters():
        if name.split(".")[-1] in ("position_embeddings", "position_embedding", "pos_embed"):
            return f"has positions of an image ({name}), which are no sequence"
    if (grid := getattr(config, "axial_shape", None)) is not None:
        return f"has positions of a grid ({grid}), which are no sequence"
    return None


def _tables(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in _TABLES
    ]


def _first(table: nn.Embedding) -> int:
    """Row of the first position: after that of padding in RoBERTa, after an offset in OPT."""
    if table.padding_idx is not None:
        return table.padding_idx + 1
    return int(getattr(table, "offset", 0))


def _extend_buffers(module: nn.Module, rows: dict[int, int]) -> None:
    """Extend position numbers, token types and causal masks that are as long as a table was."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        size = rows.get(buffer.shape[-1]) if buffer.ndim else None
        if size is None:
            continue
        index = torch.arange(size, device=buffer.device)
        # Replaced within _buffers, a buffer stays persistent or not.
        if name in ("position_ids", "token_type_ids"):
            longer = index if name == "position_ids" else torch.zeros_like(index)
            module._buffers[name] = longer.to(buffer.dtype).expand(1, -1)
        elif name == "bias" and buffer.ndim == 4:
            # The causal masks of GPT-2, and of GPT-Neo with its window.
            config: Any = getattr(module, "config", None)
            is_local = getattr(module, "attention_type", None) == "local"
            reach = int(config.window_size) if is_local else size
            distance = index[:, None] - index
            seen = (distance >= 0) & (distance < reach)
            module._buffers[name] = seen.view(1, 1, size, size).to(buffer.dtype)
