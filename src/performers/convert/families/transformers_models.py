"""transformers models whose attention goes through the attention interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from performers.convert.conversion import FAVOR
from performers.convert.families.base import Family, Site
from performers.convert.families.trial import try_model
from performers.convert.interface.call import AttentionCall, check_linear, exact_attention
from performers.convert.interface.hooks import (
    enter_attention,
    enter_rotary_model,
    is_rotary_model,
)
from performers.convert.interface.implementation import intercept_attention, set_implementation
from performers.convert.interface.modules import forward_code, interface_modules
from performers.convert.record import separate_configurations_, write_record
from performers.nn import FavorAttention

__all__ = ["AttentionModule", "TransformersModels", "attention_modules"]

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


@dataclass(frozen=True, eq=False)
class AttentionModule(Site):
    """A module whose forward pass calls transformers' attention interface."""

    def window(self) -> int | None:
        """The module's own sliding window, or None."""
        if hasattr(self.module, "sliding_window"):
            window: Any = self.module.sliding_window
            return window
        # Some modules pass on their configuration's.
        code = forward_code(self.module)
        if code is not None and "sliding_window" in (*code.co_names, *code.co_consts):
            return getattr(self.module.config, "sliding_window", None)
        return None

    def refusal(self) -> str | None:
        """What the module does that linear attention cannot, or None."""
        reason = self._other_attention()
        if reason is None:
            return None
        return (
            f"{reason}, which linear attention cannot do: name the layers that can be converted "
            "with layers=, or use another model"
        )

    def _other_attention(self) -> str | None:
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


class TransformersModels(Family[AttentionModule]):
    """Gives attention modules a `FavorAttention` each, and the model a record of its conversion.

    The modules within a sliding window of their own are left out: they are linear already.
    """

    takes_lists = True

    def sites(self) -> list[AttentionModule]:
        """Modules that can become linear, in the order of ``named_modules``."""
        if any(hasattr(module, FAVOR) for module in self.model.modules()):
            raise ValueError(f"{self.kind} is converted already: start from the original model")
        sites = [
            x
            for x in attention_modules(self.model)
            if (self.conversion.cross_attention or not x.is_cross) and x.window() is None
        ]
        if not sites:
            raise ValueError(
                f"{self.kind} has no attention to convert: none of its modules calls transformers' "
                "attention interface, or all of them attend within a sliding window already"
            )
        return sites

    def prepare(self, sites: Sequence[AttentionModule]) -> None:
        """Check lists of keys and weights, and try the model."""
        listed = self.conversion.listed_keys
        causal = [x.name for x in sites if x.is_cross or getattr(x.module, "is_causal", False)]
        if listed and causal:
            raise ValueError(
                f"listed_keys={listed} is for self-attention to both sides, and {causal[0]} is "
                "not: a decoder's running sums hold no lists; pass listed_keys=0 with a larger "
                "window, or name the encoder's layers with layers="
            )
        if not self.is_loading:
            for site in sites:
                if _device(site).type == "meta":
                    raise ValueError(
                        f"{site.name} has no weights in memory (on the meta device, or "
                        "offloaded): load the whole model first"
                    )
        separate_configurations_(self.model)
        if not self.is_loading:
            try_model(self.model, list(sites))

    def build(self, site: AttentionModule, generator: torch.Generator | None) -> FavorAttention:
        """The submodule of an attention module."""
        favor = self.conversion.attention(
            site.head_dim, site.key_heads, is_cross=site.is_cross, generator=generator
        )
        return favor if self.is_loading else favor.to(_device(site))

    def observe(
        self, favors: Mapping[AttentionModule, FavorAttention], add: Callable[..., None]
    ) -> AbstractContextManager[None]:
        """Report the calls of the attention interface."""

        def observer(site: AttentionModule) -> Callable[[AttentionCall], Tensor]:
            def attend(call: AttentionCall) -> Tensor:
                check_linear(call)
                add(
                    site,
                    call.query,
                    call.key,
                    is_causal=call.pattern.is_causal,
                    key_mask=call.pattern.key_mask,
                    cu_seqlens=call.pattern.cu_seqlens,
                    scale=call.scale,
                )
                return exact_attention(call)

            return attend

        return intercept_attention({site.module: observer(site) for site in favors}, self.model)

    def install(self, favors: Mapping[AttentionModule, FavorAttention]) -> None:
        """Set the attention implementation, the submodules, the hooks and the record."""
        model = self.model
        set_implementation(model)
        blocks = {site.module: favor for site, favor in favors.items()}
        for _, module in interface_modules(model):
            setattr(module, FAVOR, blocks.get(module))
        for site, favor in favors.items():
            favor.train(site.module.training)
            # The keys of an encoder stay in the cache as they are: they do not grow with the
            # output.
            if not site.is_cross:
                site.module.register_forward_pre_hook(enter_attention, with_kwargs=True)
        for module in model.modules():
            if is_rotary_model(module) and not blocks.keys().isdisjoint(module.modules()):
                module.register_forward_pre_hook(enter_rotary_model, with_kwargs=True)
        if any(not site.is_cross for site in favors):
            # What transformers asks before assisted decoding, which takes tokens back.
            model._is_stateful = True
        write_record(model, self.conversion)


def attention_modules(model: nn.Module) -> list[AttentionModule]:
    """Find the modules that go through transformers' attention interface."""
    return [
        AttentionModule(name, module, _is_cross(name, module), *_sizes(name, module))
        for name, module in interface_modules(model)
    ]


def _device(site: Site) -> torch.device:
    # Modules with int8 weights have no parameters, and run on a CPU.
    device: torch.device = next(site.module.parameters(), torch.empty(0, device="cpu")).device
    return device


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
