"""From a pretrained Transformer to a Performer, in one call."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from performers.convert.block import BLOCK, FavorBlock
from performers.convert.fitting import check_calibration
from performers.convert.settings import ConversionSettings
from performers.features.projections import Projection
from performers.features.softmax import Estimator

__all__ = ["convert_transformers_model", "to_performer"]

_LOG = logging.getLogger("performers")
Model = TypeVar("Model", bound=nn.Module)


def to_performer(
    model: Model,
    *,
    num_features: int | None = None,
    estimator: Estimator = "positive",
    window: int | None = None,
    sinks: int = 0,
    key_list: int = 0,
    calibration: Iterable[Any] | None = None,
    layers: Iterable[int] | None = None,
    projection: Projection = "orthogonal",
    cross_attention: bool = False,
    generator: torch.Generator | None = None,
) -> Model:
    """Make the attention of a model linear in the length of its input, in place.

    Softmax attention ``softmax(scale q . k) v`` becomes an estimate by random features
    (``favor_attention``), exact within ``window`` and for the first ``sinks`` keys. Weights stay
    as they are. What works best on pretrained models is ``estimator="data_aware"`` with a few
    ``calibration`` batches, a ``window`` of 32 to 128, and 4 ``sinks`` for decoders; then
    `distill`.

    Layers that attend within a sliding window of their own stay exact (they are linear already),
    and so does attention from a decoder to an encoder unless ``cross_attention`` asks for it.
    Dropout on attention weights, which are never formed, is switched off in the converted layers,
    with a warning.

    A transformers model is saved with ``save_pretrained`` as usual and loaded with
    `load_performer`. In a torch model each self-attention ``nn.MultiheadAttention`` becomes a
    ``PerformerAttention`` with the same parameters; save its ``state_dict``, and load it into a
    model converted with the same arguments.

    Args:
        model: A transformers model whose attention goes through the attention interface, a model
            of ``performers.models`` with exact attention, or a torch model with
            ``nn.MultiheadAttention`` in it.
        num_features: Length of a feature vector; None: the default of ``SoftmaxFeatures``.
        estimator: As in ``SoftmaxFeatures``.
        window: Exact softmax where ``|i - j| <= window``; None: features for every pair.
        sinks: The first ``sinks`` keys are exact for every query.
        key_list: Each query also meets this many keys exactly that are listed for their content
            (``ListedKeys``, fitted to the queries of ``calibration`` if there are any); 0: none.
            For encoders among transformers models: lists know no running sums.
        calibration: Batches of model inputs (mappings of keyword arguments, or tensors of the main
            input) that estimators such as ``data_aware``, and lists of keys, are fitted to; a few
            thousand tokens do.
        layers: Indices of the attention layers that become linear, negative ones from the end; the
            others stay exact. Counted are, in the order of the model, those that can become
            linear: not those with a sliding window of their own. None: all.
        projection: As in ``SoftmaxFeatures``.
        cross_attention: Also convert attention from a decoder to an encoder (features alone).
        generator: Where the projections are drawn from; None: torch's own.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The model does what linear attention cannot do, has no attention that can be
            converted, is converted already, or an argument is out of range; the model is then as
            it was.

    Example:
        >>> import torch
        >>> from performers.convert import to_performer
        >>> encoder = torch.nn.TransformerEncoder(
        ...     torch.nn.TransformerEncoderLayer(64, 4, dropout=0.0, batch_first=True), 2
        ... )
        >>> linear = to_performer(encoder, window=16)
        >>> linear(torch.randn(1, 1000, 64)).shape
        torch.Size([1, 1000, 64])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    settings = ConversionSettings(
        num_features=num_features,
        estimator=estimator,
        projection=projection,
        window=window,
        sinks=sinks,
        key_list=key_list,
        layers=None if layers is None else tuple(layers),
        cross_attention=cross_attention,
    )
    # Refuses names and numbers that do not exist before anything else happens.
    settings.feature_map(8, 1)
    names = _convert(model, settings, calibration, generator)
    _LOG.info("converted %d attention layers: %s", len(names), ", ".join(names))
    return model


def _convert(
    model: nn.Module,
    settings: ConversionSettings,
    calibration: Iterable[Any] | None,
    generator: torch.Generator | None,
) -> list[str]:
    try:
        from transformers import PreTrainedModel
    except ImportError:
        # A torch model needs nothing else.
        pass
    else:
        if isinstance(model, PreTrainedModel):
            from performers.models import PerformerConfig

            if isinstance(model.config, PerformerConfig):
                from performers.convert.performer_models import convert_performer_model

                _check_no_lists(settings, model)
                return convert_performer_model(model, settings, calibration, generator)
            if not check_calibration(settings, calibration):
                calibration = None
            return convert_transformers_model(model, settings, calibration, generator)
    from performers.convert.torch_modules import convert_torch_modules

    _check_no_wrapper(model)
    _check_no_lists(settings, model)
    return convert_torch_modules(model, settings, calibration, generator)


def _check_no_wrapper(model: nn.Module) -> None:
    """Name the model to pass where one around it was passed."""
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return
    if importlib.util.find_spec("transformers") is None:
        return
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            parts = (f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
            raise ValueError(
                f"model is a {type(model).__name__} around a {type(module).__name__}: pass the "
                f"transformers model itself, model{''.join(parts)}, which is converted in place"
            )


def _check_no_lists(settings: ConversionSettings, model: nn.Module) -> None:
    if settings.key_list:
        raise ValueError(
            f"key_list={settings.key_list} is for encoders among transformers models, and "
            f"{type(model).__name__} is none: pass key_list=0, with a larger window"
        )


def convert_transformers_model(
    model: Any,
    settings: ConversionSettings,
    calibration: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
    *,
    warn: bool = True,
    weights_follow: bool = False,
) -> list[str]:
    """Give a transformers model's attention modules their blocks, and the model its record.

    Args:
        model: A transformers model.
        settings: What the blocks are made of.
        calibration: Batches to fit the features to.
        generator: Where the projections are drawn from.
        warn: Whether to say that the dropout of attention weights is switched off.
        weights_follow: The model is being loaded: its weights may still be missing.

    Returns:
        Names of the modules that became linear.

    Raises:
        ValueError: See `to_performer`.
    """
    from performers.convert.calibration import calibrate_blocks
    from performers.convert.hooks import enter_attention, enter_rotary_model, is_rotary_model
    from performers.convert.interface import set_implementation
    from performers.convert.modules import attention_modules
    from performers.convert.probing import try_model
    from performers.convert.record import separate_configurations_, write_record

    kind = type(model).__name__
    if any(hasattr(module, BLOCK) for module in model.modules()):
        raise ValueError(f"{kind} is converted already: start from the original model")
    found = attention_modules(model)
    candidates = [
        x for x in found if (settings.cross_attention or not x.is_cross) and x.window() is None
    ]
    if not candidates:
        raise ValueError(
            f"{kind} has no attention to convert: none of its modules calls transformers' "
            "attention interface, or all of them attend within a sliding window already"
        )
    settings.check_layers(len(candidates))
    chosen = [x for i, x in enumerate(candidates) if settings.converts(i, len(candidates))]
    for part in chosen:
        if (reason := part.refusal()) is not None:
            raise ValueError(
                f"{part.name} ({type(part.module).__name__}) {reason}, which linear attention "
                "cannot do: name the layers that can be converted with layers=, or use another "
                "model"
            )
    causal = [x.name for x in chosen if x.is_cross or getattr(x.module, "is_causal", False)]
    if settings.key_list and causal:
        raise ValueError(
            f"key_list={settings.key_list} is for self-attention to both sides, and {causal[0]} is "
            "not: a decoder's running sums hold no lists; pass key_list=0 with a larger window, or "
            "name the encoder's layers with layers="
        )
    blocks: dict[nn.Module, FavorBlock] = {}
    for part in chosen:
        # Modules with int8 weights have no parameters, and run on a CPU.
        reference = next(part.module.parameters(), torch.empty(0, device="cpu"))
        if reference.is_meta and not weights_follow:
            raise ValueError(
                f"{part.name} has no weights in memory (on the meta device, or offloaded): load "
                "the whole model first"
            )
        features = settings.feature_map(part.head_dim, part.key_heads, generator)
        # Between two sequences no key is near a query, and none comes first.
        window, sinks = (None, 0) if part.is_cross else (settings.window, settings.sinks)
        listed_keys = settings.buckets(part.head_dim, part.key_heads, generator)
        block = FavorBlock(features, window=window, sinks=sinks, listed_keys=listed_keys)
        blocks[part.module] = block if weights_follow else block.to(reference.device)
    separate_configurations_(model)
    if not weights_follow:
        try_model(model, chosen)
    if calibration is not None:
        calibrate_blocks(model, blocks, calibration)
    set_implementation(model)
    for part in found:
        setattr(part.module, BLOCK, blocks.get(part.module))
    for part in chosen:
        blocks[part.module].train(part.module.training)
        # The keys of an encoder stay in the cache as they are: they do not grow with the output.
        if not part.is_cross:
            part.module.register_forward_pre_hook(enter_attention, with_kwargs=True)
    converted = set(blocks)
    for module in model.modules():
        if is_rotary_model(module) and not converted.isdisjoint(module.modules()):
            module.register_forward_pre_hook(enter_rotary_model, with_kwargs=True)
    _switch_dropout_off(chosen, warn=warn)
    if any(not part.is_cross for part in chosen):
        # What transformers asks before assisted decoding, which takes tokens back.
        model._is_stateful = True
    write_record(model, settings)
    return [part.name for part in chosen]


def _switch_dropout_off(parts: list[Any], *, warn: bool) -> None:
    rates = sorted({part.dropout() for part in parts} - {0.0})
    for part in parts:
        part.switch_dropout_off()
    if rates and warn:
        warnings.warn(
            f"the dropout of attention weights ({', '.join(map(str, rates))}) is switched off in "
            f"{len(parts)} converted layers: linear attention never forms the weights",
            stacklevel=5,
        )
