"""Models of ``performers.models`` with exact attention."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from performers.convert.families.base import Family, Site, pre_hooks
from performers.models import PerformerConfig, PerformerPreTrainedModel
from performers.models.attention import PerformerSelfAttention, build_mechanism
from performers.nn import FavorAttention


class PerformerModels(Family):
    """Conversion of a model with ``attention="exact"`` to one with ``"favor-softmax"``.

    The model gets a configuration of its own with the new attention, so that ``save_pretrained``
    and ``from_pretrained`` need nothing else. Layers that the conversion leaves out are the
    configuration's ``exact_layers``.
    """

    config: PerformerConfig

    def sites(self) -> list[Site]:
        """List all layers; refuse a model whose attention is not exact."""
        config = self.model.config
        attention = config.attention
        if attention != "exact":
            reason = f"attention={attention!r}, which computes no attention to approximate"
            if attention.startswith("favor-"):
                reason = f"linear attention already (attention={attention!r})"
            raise ValueError(f"{self.kind} has {reason}: start from a model with attention='exact'")
        if self.conversion.learned:
            raise ValueError(
                "learned features are not available for models of performers.models: their "
                "configuration cannot say them"
            )
        return [
            Site(name, module, False, config.head_dim, config.num_attention_heads)
            for name, module in self.model.named_modules()
            if isinstance(module, PerformerSelfAttention)
        ]

    def prepare(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Make the configuration, which its constructor checks."""
        before, conversion = self.model.config, self.conversion
        linear = {site.module.layer for site in sites}
        shared = ("num_features", "estimator", "projection", "window", "sinks")
        changes = {name: getattr(conversion, name) for name in shared} | {
            "attention": "favor-softmax",
            "regularized": False,
            "features_per_head": True,
            "exact_layers": sorted(set(range(before.num_hidden_layers)) - linear) or None,
        }
        PerformerConfig.from_dict({**before.to_dict(), **changes})
        self.config = copy.deepcopy(before)
        for name, value in changes.items():
            setattr(self.config, name, value)
        return sites

    def build(self, site: Site, generator: torch.Generator | None) -> FavorAttention:
        """Build the mechanism of one layer."""
        weight = site.module.query_key_value.weight
        mechanism = build_mechanism(self.config, site.module.layer, generator)
        assert isinstance(mechanism, FavorAttention)
        return mechanism.to(weight.device, weight.dtype).train(site.module.training)

    def observe(
        self, favors: Mapping[Site, FavorAttention], add: Callable[..., None]
    ) -> AbstractContextManager[None]:
        """Report the calls of the exact mechanisms."""

        def report(site: Site, mechanism: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            query, key, _, context, _ = args
            masks = {"key_mask": context.key_mask, "cu_seqlens": context.cu_seqlens}
            add(site, query, key, is_causal=context.is_causal, **masks)

        return pre_hooks({x.module.mechanism: functools.partial(report, x) for x in favors})

    def install(self, favors: Mapping[Site, FavorAttention]) -> None:
        """Replace mechanisms and the configuration of the model and the models within it."""
        for site, favor in favors.items():
            site.module.mechanism = favor
        before = self.model.config
        for child in self.model.modules():
            if isinstance(child, PerformerPreTrainedModel) and child.config is before:
                child.config = self.config
