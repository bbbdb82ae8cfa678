"""transformers models whose attention goes through the attention interface."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from performers.convert.families.base import Family, Site
from performers.convert.families.shards import enter_shard
from performers.convert.families.trial import try_model
from performers.convert.interface.cache import (
    enter_attention,
    enter_rotary_model,
    is_rotary_model,
)
from performers.convert.interface.call import AttentionCall, check_linear, exact_attention
from performers.convert.interface.implementation import (
    forward_code,
    intercept_attention,
    interface_modules,
    set_implementation,
)
from performers.convert.options import FAVOR, LEAVE_EXACT
from performers.convert.record import separate_configurations_, write_record
from performers.nn import FavorAttention

_HEAD_DIMS = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads")
# Attributes of attention modules with the dropout of their weights.
_DROPOUTS = (
    "attention_dropout",
    "attn_dropout",
    "attn_drop",
    "dropout",
    "dropout_p",
    "dropout_prob",
)
_POSITION_BIAS = "adds a position bias to its scores"
# Attributes of modules that compute something else than masked softmax attention.
_OTHER_ATTENTION = {
    "attn_logit_softcapping": "soft-caps its scores (attn_logit_softcapping)",
    "is_kv_shared_layer": "takes its keys and values from another layer (is_kv_shared_layer)",
    "store_full_length_kv": "lends its keys and values to other layers (store_full_length_kv)",
    "reorder_and_upcast_attn": "bypasses the attention interface (reorder_and_upcast_attn=True)",
}


@dataclass(frozen=True, eq=False)
class AttentionModule(Site):
    """A module whose forward pass calls transformers' attention interface."""

    def window(self) -> int | None:
        """Sliding window of the module, or None."""
        if hasattr(self.module, "sliding_window"):
            window: Any = self.module.sliding_window
            return window
        # Some modules read it from their configuration.
        code = forward_code(self.module)
        if code is not None and "sliding_window" in (*code.co_names, *code.co_consts):
            return getattr(self.module.config, "sliding_window", None)
        return None

    def refusal(self) -> str | None:
        """Reason why the module cannot become linear, and the remedy; None: it can."""
        module = self.module
        reasons = [text for name, text in _OTHER_ATTENTION.items() if getattr(module, name, None)]
        if getattr(module, "has_relative_attention_bias", None) is not None:
            reasons.append(_POSITION_BIAS)
        kind = getattr(module, "position_embedding_type", "absolute")
        if kind in ("relative_key", "relative_key_query"):
            reasons.append(f"{_POSITION_BIAS} ({kind})")
        if getattr(module, "sinks", None) is not None:
            reasons.append("has learned sink logits in its softmax")
        if not reasons:
            return None
        return (
            f"{reasons[0]}, which linear attention cannot do: {LEAVE_EXACT}, or use another model"
        )

    def remove_dropout(self) -> float:
        """Set the dropout of the attention weights to 0; returns its probability before."""
        rate = 0.0
        for name in _DROPOUTS:
            value = getattr(self.module, name, None)
            if isinstance(value, nn.Dropout):
                rate, value.p = max(rate, value.p), 0.0
            elif isinstance(value, float):
                rate = max(rate, value)
                setattr(self.module, name, 0.0)
        return rate


class TransformersModels(Family):
    """Conversion by a `FavorAttention` in each attention module and a record in the configuration.

    Modules with a sliding window are left out: they are linear already.
    """

    takes_lists = True

    def sites(self) -> list[AttentionModule]:
        """List the modules that can become linear, in the order of ``named_modules``."""
        if any(hasattr(module, FAVOR) for module in self.model.modules()):
            raise ValueError(f"{self.kind} is converted already: start from the original model")
        sites = [
            AttentionModule(name, module, _is_cross(name, module), *_sizes(name, module))
            for name, module in interface_modules(self.model)
        ]
        sites = [site for site in sites if site.window() is None]
        if not sites:
            raise ValueError(
                f"{self.kind} has no attention to convert: none of its modules calls transformers' "
                "attention interface, or all of them attend within a sliding window already"
            )
        return sites

    def prepare(self, sites: Sequence[Site]) -> Collection[Site]:
        """Check lists of keys and weights, and run the model on made-up inputs."""
        listed = self.conversion.listed_keys
        causal = [x.name for x in sites if x.is_cross or getattr(x.module, "is_causal", False)]
        if listed and causal:
            raise ValueError(
                f"listed_keys={listed} is for bidirectional self-attention, and {causal[0]} is "
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
        return () if self.is_loading else try_model(self.model, sites)

    def build(self, site: Site, generator: torch.Generator | None) -> FavorAttention:
        """Build the submodule of an attention module."""
        favor = super().build(site, generator)
        return favor if self.is_loading else favor.to(_device(site))

    def observe(
        self, favors: Mapping[Site, FavorAttention], add: Callable[..., None]
    ) -> AbstractContextManager[None]:
        """Report the calls of the attention interface."""

        def attend(site: Site, call: AttentionCall) -> Tensor:
            check_linear(call)
            boundaries = call.pattern.cu_seqlens
            add(site, call.query, call.key, cu_seqlens=boundaries, **call.favor_options())
            return exact_attention(call)

        functions = {site.module: functools.partial(attend, site) for site in favors}
        return intercept_attention(functions, self.model)

    def install(self, favors: Mapping[Site, FavorAttention]) -> None:
        """Set the attention implementation, the submodules, the hooks and the record."""
        model = self.model
        set_implementation(model)
        blocks = {site.module: favor for site, favor in favors.items()}
        for _, module in interface_modules(model):
            setattr(module, FAVOR, blocks.get(module))
        for site, favor in favors.items():
            favor.train(site.module.training)
            # The keys of an encoder stay in the cache: they do not grow with the output.
            if not site.is_cross:
                site.module.register_forward_pre_hook(enter_attention, with_kwargs=True)
        for module in model.modules():
            if blocks.keys().isdisjoint(module.modules()):
                continue
            if isinstance(module, PreTrainedModel):
                module.register_forward_pre_hook(enter_shard, with_kwargs=True)
            if is_rotary_model(module):
                module.register_forward_pre_hook(enter_rotary_model, with_kwargs=True)
        if any(not site.is_cross for site in favors):
            # Makes transformers refuse assisted decoding, which takes tokens back.
            model._is_stateful = True
        write_record(model, self.conversion)


def _device(site: Site) -> torch.device:
    # Modules with int8 weights have no parameters, and run on a CPU.
    device: torch.device = next(site.module.parameters(), torch.empty(0, device="cpu")).device
    return device


def _is_cross(name: str, module: nn.Module) -> bool:
    last = name.rsplit(".", 1)[-1].lower()
    return (
        bool(getattr(module, "is_cross_attention", False))
        or "cross" in type(module).__name__.lower()
        or "cross" in last
        or last in ("encoder_attn", "encdecattention", "encoder_decoder_attention")
        or "crossattention" in name.lower()
    )


def _sizes(name: str, module: nn.Module) -> tuple[int, int]:
    head_dim = _first_positive(module, _HEAD_DIMS)
    config = getattr(module, "config", None)
    heads = _first_positive(module, _HEADS) or _first_positive(config, _HEADS)
    key_heads = getattr(module, "num_key_value_heads", None)
    groups = getattr(module, "num_key_value_groups", None)
    if key_heads is None and groups and heads:
        key_heads = heads // groups
    key_heads = key_heads or heads
    if not head_dim or not key_heads:
        raise ValueError(
            f"the sizes of the heads of {name} ({type(module).__name__}) are unknown: it has "
            f"none of the attributes {_HEAD_DIMS} or none of {_HEADS}"
        )
    return int(head_dim), int(key_heads)


def _first_positive(owner: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
