"""The attention modules of a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

__all__ = ["AttentionModule", "attention_modules", "interface_modules"]

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_HEAD_DIMS = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads")
# Where attention modules keep the dropout of their weights, when it is not the configuration's.
_DROPOUTS = (
    "attention_dropout",
    "attn_dropout",
    "attn_drop",
    "dropout",
    "dropout_p",
    "dropout_prob",
)


@dataclass(frozen=True)
class AttentionModule:
    """A module whose forward pass calls transformers' attention interface.

    Attributes:
        name: Its name in the model.
        module: The module.
        is_cross: Attention from a decoder to an encoder.
        head_dim: Width of queries and keys.
        key_heads: Heads of the keys.
    """

    name: str
    module: nn.Module
    is_cross: bool
    head_dim: int
    key_heads: int

    def window(self) -> int | None:
        """The module's own sliding window, or None."""
        if hasattr(self.module, "sliding_window"):
            window: Any = self.module.sliding_window
            return window
        # Some modules pass on their configuration's.
        code = _forward_code(self.module)
        if code is not None and "sliding_window" in (*code.co_names, *code.co_consts):
            return getattr(self.module.config, "sliding_window", None)
        return None

    def refusal(self) -> str | None:
        """What the module does that linear attention cannot, or None."""
        module = self.module
        if getattr(module, "attn_logit_softcapping", None):
            return "soft-caps its scores (attn_logit_softcapping)"
        if getattr(module, "has_relative_attention_bias", None) is not None:
            return "adds a position bias to its scores"
        if getattr(module, "position_embedding_type", "absolute") in (
            "relative_key",
            "relative_key_query",
        ):
            return f"adds a position bias to its scores ({module.position_embedding_type})"
        if getattr(module, "sinks", None) is not None:
            return "has learned sink logits in its softmax"
        if getattr(module, "is_kv_shared_layer", False):
            return "takes its keys and values from another layer (is_kv_shared_layer)"
        if getattr(module, "store_full_length_kv", False):
            return "lends its keys and values to other layers (store_full_length_kv)"
        if getattr(module, "reorder_and_upcast_attn", False):
            return "bypasses the attention interface (reorder_and_upcast_attn=True)"
        return None

    def dropout(self) -> float:
        """The probability that a weight is dropped in training."""
        return max((_probability(value) for _, value in self._dropouts()), default=0.0)

    def switch_dropout_off(self) -> None:
        """Set the dropout of the weights to 0."""
        for name, value in self._dropouts():
            if isinstance(value, nn.Dropout):
                value.p = 0.0
            else:
                setattr(self.module, name, 0.0)

    def _dropouts(self) -> Iterator[tuple[str, Any]]:
        for name in _DROPOUTS:
            value = getattr(self.module, name, None)
            if isinstance(value, (nn.Dropout, float)):
                yield name, value


def attention_modules(model: nn.Module) -> list[AttentionModule]:
    """Find the modules that go through transformers' attention interface.

    Args:
        model: A transformers model.

    Returns:
        Self-attention and cross-attention modules, in the order of ``named_modules``.

    Raises:
        ValueError: The width or the number of a module's heads cannot be told.
    """
    return [
        AttentionModule(name, module, _is_cross(name, module), *_sizes(name, module))
        for name, module in interface_modules(model)
    ]


def interface_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose forward pass calls transformers' attention interface, with their names.

    Args:
        model: A transformers model.
    """
    for name, module in model.named_modules():
        code = _forward_code(module)
        if code is not None and _INTERFACE in code.co_names:
            yield name, module


def _forward_code(module: nn.Module) -> CodeType | None:
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _is_cross(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    last = name.rsplit(".", 1)[-1].lower()
    return (
        bool(getattr(module, "is_cross_attention", False))
        or "cross" in kind
        or "cross" in last
        or last in ("encoder_attn", "encdecattention", "encoder_decoder_attention")
        or "crossattention" in name.lower()
    )


def _sizes(name: str, module: nn.Module) -> tuple[int, int]:
    head_dim = _first(module, _HEAD_DIMS)
    config = getattr(module, "config", None)
    heads = _first(module, _HEADS) or _first(config, _HEADS)
    key_heads = getattr(module, "num_key_value_heads", None)
    groups = getattr(module, "num_key_value_groups", None)
    if key_heads is None and groups and heads:
        key_heads = heads // groups
    key_heads = key_heads or heads
    if not head_dim or not key_heads:
        raise ValueError(
            f"the sizes of the heads of {name} ({type(module).__name__}) cannot be told: it has "
            f"none of {_HEAD_DIMS} or of {_HEADS}"
        )
    return int(head_dim), int(key_heads)


def _first(owner: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _probability(value: Any) -> float:
    return float(value.p if isinstance(value, nn.Dropout) else value)
