"""Models of ``performers.models`` with exact attention, made linear."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from performers.convert.conversion import Conversion
from performers.convert.fitting import check_calibration, fit
from performers.models import PerformerConfig, PerformerPreTrainedModel
from performers.models.attention import (
    AttentionContext,
    PerformerSelfAttention,
    build_mechanism,
)
from performers.nn import FavorAttention

__all__ = ["convert_performer_model"]


def convert_performer_model(
    model: PerformerPreTrainedModel,
    settings: Conversion,
    calibration: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Turn a model with ``attention="exact"`` into one with ``"favor-softmax"``, in place.

    Weights stay as they are. The model gets a configuration of its own that says what it has
    become, so that ``save_pretrained`` and ``from_pretrained`` work as ever. Layers that
    ``settings.layers`` leaves out are the configuration's ``exact_layers``.

    Args:
        model: Any model of ``performers.models``.
        settings: What the attention becomes.
        calibration: Batches of model inputs to fit the features to: tensors of ``input_ids``,
            tuples of positional arguments or mappings of keyword arguments (labels are left out).
            Used by estimators that are fitted.
        generator: Where the projections are drawn from; None: torch's own.

    Returns:
        Names of the modules whose attention became linear, in order.

    Raises:
        TypeError: A batch has another type.
        ValueError: The attention is not exact, the settings do not fit the model, or calibration is
            missing, empty or does not fit; the model is then as it was.
    """
    attention = model.config.attention
    if attention.startswith("favor-"):
        raise ValueError(
            f"{type(model).__name__} has linear attention already (attention={attention!r}): start "
            "from a model with attention='exact'"
        )
    if attention != "exact":
        raise ValueError(
            f"{type(model).__name__} has attention={attention!r}, which computes no attention that "
            "features could stand in for: start from a model with attention='exact'"
        )
    if settings.learned:
        raise ValueError(
            "learned features are not available for models of performers.models: their "
            "configuration cannot say them"
        )
    to_fit = check_calibration(settings, calibration)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PerformerSelfAttention)
    }
    config = _converted_config(model.config, settings)
    chosen = {
        name: module
        for name, module in found.items()
        if config.layer_attention(module.layer) != "exact"
    }
    mechanisms: dict[str, FavorAttention] = {}
    for name, module in chosen.items():
        weight = module.query_key_value.weight
        mechanism = build_mechanism(config, module.layer, generator)
        assert isinstance(mechanism, FavorAttention)
        mechanisms[name] = mechanism.to(weight.device, weight.dtype).train(module.training)
    if to_fit:
        assert calibration is not None
        _calibrate(model, chosen, mechanisms, calibration)
    for name, module in chosen.items():
        module.mechanism = mechanisms[name]
    before = model.config
    for child in model.modules():
        if isinstance(child, PerformerPreTrainedModel) and child.config is before:
            child.config = config
    return list(chosen)


def _converted_config(config: PerformerConfig, settings: Conversion) -> PerformerConfig:
    """A copy, which other models do not share, with the settings; checked by its constructor."""
    count = config.num_hidden_layers
    exact = sorted(set(range(count)) - set(settings.choose(range(count))))
    changes = {
        "attention": "favor-softmax",
        "num_features": settings.num_features,
        "estimator": settings.estimator,
        "projection": settings.projection,
        "regularized": False,
        "window": settings.window,
        "sinks": settings.sinks,
        "features_per_head": True,
        "exact_layers": exact or None,
    }
    PerformerConfig.from_dict({**config.to_dict(), **changes})
    converted = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(converted, name, value)
    return converted


def _calibrate(
    model: PerformerPreTrainedModel,
    chosen: Mapping[str, PerformerSelfAttention],
    mechanisms: Mapping[str, FavorAttention],
    batches: Iterable[Any],
) -> None:
    """Run the exact model and fit the features of what will replace its mechanisms."""

    @contextmanager
    def observe(add: Callable[..., None]) -> Iterator[None]:
        handles = [
            module.mechanism.register_forward_pre_hook(_observer(name, add))
            for name, module in chosen.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    fit(model, mechanisms, observe, batches, functools.partial(_without_labels, model))


def _without_labels(
    model: PerformerPreTrainedModel, *inputs: Any, labels: Any = None, **options: Any
) -> None:
    """Run a model for its attention alone."""
    del labels
    if model.config.is_decoder:
        options.setdefault("use_cache", False)
    model(*inputs, **options)


def _observer(name: str, add: Callable[..., None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def observe(mechanism: nn.Module, args: tuple[Any, ...]) -> None:
        query, key, _, context, _ = args
        assert isinstance(context, AttentionContext)
        add(
            name,
            query,
            key,
            is_causal=context.is_causal,
            key_mask=context.key_mask,
            cu_seqlens=context.cu_seqlens,
        )

    return observe
