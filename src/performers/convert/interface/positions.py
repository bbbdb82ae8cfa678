"""More positions for models that learned a table of them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["extend_positions_", "learned_positions"]

Model = TypeVar("Model", bound=nn.Module)
# What a table of positions is called in BERT's family, in OPT's and BART's, in GPT-2's and in ours.
_TABLES = ("position_embeddings", "embed_positions", "wpe", "positions")
_CONFIG = "max_position_embeddings"


def learned_positions(model: nn.Module) -> int | None:
    """The longest input that a learned table of positions allows; None for a model without one."""
    sizes = [table.num_embeddings - _first(table) for _, table in _tables(model)]
    return min(sizes, default=None)


def extend_positions_(model: Model, length: int) -> Model:
    """Let a model with a learned table of positions read longer inputs, in place.

    The table is repeated: position ``i`` beyond the trained ones starts from the vector of
    position ``i mod n``. Local order is then what the model knows; training teaches the rest. The
    trained positions, and hence the outputs for inputs that were possible before, stay as they
    are. The configuration is changed with the table, so that the model is saved and loaded as
    usual. Source: Beltagy et al. 2020 (arXiv 2004.05150), section 5.

    A model whose positions are rotary or relative needs no table and is left as it is.

    Args:
        model: A transformers model, converted or not.
        length: Tokens of the longest input wanted.

    Returns:
        The model.

    Raises:
        ValueError: ``length`` is below 1, or the model has positions of a kind that cannot be
            extended so (of an image, sinusoidal, or of an encoder-decoder).
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    now = learned_positions(model)
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder: extending its positions is not supported")
    images = [
        name
        for name, _ in model.named_parameters()
        if name.split(".")[-1] in ("position_embeddings", "position_embedding", "pos_embed")
    ]
    if images:
        raise ValueError(f"{kind} has positions of an image ({images[0]}), which are no sequence")
    if now is None or length <= now:
        return model
    tables = _tables(model)
    config: Any = model.config
    before = getattr(config, _CONFIG, None)
    for name, table in tables:
        if "Sinusoidal" in type(table).__name__ or getattr(config, "sinusoidal_pos_embds", False):
            raise ValueError(
                f"{kind} has sinusoidal positions ({name}), which are computed and not repeated: "
                f"build it with {_CONFIG}={length} instead"
            )
    if before is None:
        raise ValueError(f"{kind} has no {_CONFIG} in its configuration, to be changed with it")
    rows = {table.num_embeddings: length + _first(table) for _, table in tables}
    for _, table in tables:
        _repeat(table, length)
    setattr(config, _CONFIG, before + length - now)
    for module in model.modules():
        _extend_buffers(module, rows)
    return model


def _tables(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in _TABLES
    ]


def _first(table: nn.Embedding) -> int:
    """The row of the first position: RoBERTa's follow the one of padding, OPT's an offset."""
    if table.padding_idx is not None:
        return table.padding_idx + 1
    return int(getattr(table, "offset", 0))


def _repeat(table: nn.Embedding, length: int) -> None:
    first, old = _first(table), table.weight
    trained = table.num_embeddings - first
    wanted = torch.arange(length, device=old.device) % trained + first
    index = torch.cat((torch.arange(first, device=old.device), wanted))
    table.weight = nn.Parameter(old.detach()[index], requires_grad=old.requires_grad)
    table.num_embeddings = len(index)


def _extend_buffers(module: nn.Module, rows: dict[int, int]) -> None:
    """Position numbers, types and causal masks that are as long as a table was."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name in ("position_ids", "token_type_ids") and buffer.shape[-1] in rows:
            size = rows[buffer.shape[-1]]
            if name == "position_ids":
                longer = torch.arange(size, device=buffer.device, dtype=buffer.dtype)
            else:
                longer = torch.zeros(size, device=buffer.device, dtype=buffer.dtype)
            # Assigned in place of the old one, so that it stays out of saved files if that did.
            module._buffers[name] = longer.expand(1, -1)
        elif name == "bias" and buffer.ndim == 4 and buffer.shape[-1] in rows:
            reach = None
            if getattr(module, "attention_type", None) == "local":
                config: Any = module.config
                reach = int(config.window_size)
            module._buffers[name] = _causal_mask(buffer, rows[buffer.shape[-1]], reach)


def _causal_mask(like: Tensor, size: int, reach: int | None) -> Tensor:
    """What GPT-2 and GPT-Neo keep: a query sees itself and what precedes it within reach."""
    index = torch.arange(size, device=like.device)
    distance = index[:, None] - index
    seen = (distance >= 0) & (distance < (size if reach is None else reach))
    return seen.view(1, 1, size, size).to(like.dtype)
