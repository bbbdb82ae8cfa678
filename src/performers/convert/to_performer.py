"""Conversion of a pretrained Transformer to a Performer, in one call."""

import functools
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from performers.convert.families.base import Family
from performers.convert.fitting import check_calibration, fit
from performers.convert.options import Conversion
from performers.convert.sentences import pad_inputs_, tokenized, transformer_of
from performers.features.projections import Projection
from performers.features.softmax import Estimator

_LOG = logging.getLogger("performers")
Model = TypeVar("Model", bound=nn.Module)


def to_performer(
    model: Model,
    *,
    num_features: int | None = None,
    estimator: Estimator = "positive",
    window: int | None = None,
    sinks: int = 0,
    listed_keys: int = 0,
    calibration: Iterable[Any] | None = None,
    layers: Iterable[int] | None = None,
    projection: Projection = "orthogonal",
    cross_attention: bool = False,
    generator: torch.Generator | None = None,
    example: Any = None,
) -> Model:
    """Make the attention of a model linear in the length of its input, in place.

    Softmax attention ``softmax(scale q . k) v`` becomes an estimate by random features
    (``favor_attention``), exact within ``window`` and for the first ``sinks`` keys. Weights stay
    as they are. What works best on pretrained models is ``estimator="data_aware"`` with a few
    ``calibration`` batches, a ``window`` of 32 to 128, and 4 ``sinks`` for decoders; then
    `distill`.

    Layers with a sliding window stay exact (they are linear already), and so does attention from a
    decoder to an encoder without ``cross_attention``. Dropout on attention weights, which are never
    formed, is switched off in the converted layers, with a warning if the model is in training
    mode.

    A transformers model is saved with ``save_pretrained`` as usual and loaded with
    `load_performer`; of a ``SentenceTransformer`` the transformer inside is converted, and it is
    saved and loaded as any other. In a torch model each self-attention ``nn.MultiheadAttention``
    becomes a ``PerformerAttention`` with the same parameters; save its ``state_dict``, and load it
    into a model converted with the same arguments.

    Any other torch model whose modules call ``torch.nn.functional.scaled_dot_product_attention``
    is converted with ``example``. One pass in evaluation mode finds those modules; inside them the
    calls become linear, whatever the import, with the masks of
    ``performers.scaled_dot_product_attention``. Calls that the example does not reach stay exact,
    unless they are made by a module inside a converted one. The dropout of a call is ignored with a
    warning at the call. Checkpoint such a module as a whole, not a function inside its forward
    pass. Its ``state_dict`` is saved and loaded as above; pickling works, too.

    Args:
        model: A transformers model whose attention goes through the attention interface, a model
            of sentence-transformers around one, a model of ``performers.models`` with exact
            attention, or a torch model with ``nn.MultiheadAttention`` or calls of
            ``scaled_dot_product_attention`` in it.
        num_features: Length of a feature vector; None: the default of ``SoftmaxFeatures``.
        estimator: As in ``SoftmaxFeatures``.
        window: Exact softmax where ``|i - j| <= window``; None: features for every pair.
        sinks: The first ``sinks`` keys are exact for every query.
        listed_keys: Number of keys per query that are exact by their content (``ListedKeys``,
            fitted to the queries of ``calibration``, if any); 0: none. Only for encoders among
            transformers models: a running state holds no lists.
        calibration: Batches of model inputs (mappings of keyword arguments, or tensors of the main
            input; for sentence-transformers also lists of texts) that estimators such as
            ``data_aware``, and lists of keys, are fitted to; a few thousand tokens suffice.
        layers: Indices of the attention layers that become linear, negative ones from the end; the
            others stay exact. Only layers that can become linear count, in the order of the model:
            not those with a sliding window. None: all.
        projection: As in ``SoftmaxFeatures``.
        cross_attention: Also convert attention from a decoder to an encoder (features alone).
        generator: Generator of the projections; None: torch's default.
        example: Inputs of a torch model, a batch as in ``calibration``, on which its modules call
            ``scaled_dot_product_attention``; None: only ``nn.MultiheadAttention`` is converted.
            Two sequences, of which one attends to the other, must differ in length: with equal
            lengths a call is taken for self-attention, converted without ``cross_attention`` and
            given ``window`` and ``sinks``.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: The model does what linear attention cannot do, has no attention that can be
            converted, is converted already, or an argument is out of range; the model is then
            unchanged.

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
    conversion = Conversion(
        num_features=num_features,
        estimator=estimator,
        projection=projection,
        window=window,
        sinks=sinks,
        listed_keys=listed_keys,
        layers=None if layers is None else tuple(layers),
        cross_attention=cross_attention,
    )
    # Refuse unknown estimators and projections before the model is inspected.
    conversion.features(8, 1, torch.Generator())
    inner = transformer_of(model)
    if inner is not model and calibration is not None:
        calibration = tokenized(model, calibration)
    names = convert(_family(inner, conversion, example), calibration, generator)
    if inner is not model:
        pad_inputs_(model)
    _LOG.info("converted %d attention layers: %s", len(names), ", ".join(names))
    return model


def convert(
    family: Family,
    calibration: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Convert a model of any family; returns the names of its converted layers."""
    conversion = family.conversion
    if conversion.listed_keys and not family.takes_lists:
        raise ValueError(
            f"listed_keys={conversion.listed_keys} is for encoders among transformers models and "
            f"models without nn.MultiheadAttention that are converted by an example, and "
            f"{family.kind} is none: pass listed_keys=0, with a larger window"
        )
    fits = not family.is_loading and check_calibration(conversion, calibration)
    sites = [x for x in family.sites() if conversion.cross_attention or not x.is_cross]
    if not sites:
        raise ValueError(
            f"{family.kind} has nothing to convert: it attends from a decoder to an encoder only "
            "(cross_attention=True converts it)"
        )
    sites = conversion.choose(sites)
    for site in sites:
        if (reason := site.refusal()) is not None:
            raise ValueError(f"{site.name} ({type(site.module).__name__}) {reason}")
    called = family.prepare(sites)
    favors = {site: family.build(site, generator) for site in sites}
    if fits and calibration is not None:
        fit(family, favors, calibration)
        called = sites
    if conversion.learned:
        for site, favor in favors.items():
            favor.learn_(site.key_heads)
    family.install(favors)
    rates = [rate for site in sites if (rate := site.remove_dropout())]
    if not family.is_loading:
        if unseen := {site.name: favors[site] for site in sites if site not in called}:
            _ExpectedCalls(family.model, unseen)
        # In evaluation mode there is no dropout to miss.
        if rates and family.model.training:
            values = ", ".join(map(str, sorted(set(rates))))
            warnings.warn(
                f"the dropout of attention weights ({values}) is switched off in "
                f"{len(rates)} converted layers: linear attention never forms the weights",
                stacklevel=3,
            )
    return [site.name for site in sites]


class _ExpectedCalls:
    """A warning after the first forward pass of a model that has not called some modules."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.names = dict.fromkeys(modules)
        self.handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(functools.partial(self.called, name))
            for name, module in modules.items()
        ]
        self.handles.append(model.register_forward_hook(self.done))

    def called(self, name: str, *args: Any) -> None:
        self.names.pop(name, None)

    def done(self, model: nn.Module, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for handle in self.handles:
            handle.remove()
        if self.names:
            warnings.warn(
                f"the forward pass of {type(model).__name__} did not call {', '.join(self.names)}, "
                "converted to linear attention: it may do without them, or compute their attention "
                "in another way, which is then still exact",
                stacklevel=2,
            )


def _family(model: nn.Module, conversion: Conversion, example: Any) -> Family:
    try:
        from transformers import PreTrainedModel
    except ImportError:
        # A torch model needs nothing else.
        pass
    else:
        if isinstance(model, PreTrainedModel):
            if example is not None:
                raise ValueError(
                    f"example is for torch models, and {type(model).__name__} is a model of "
                    "transformers, whose attention interface shows its attention: leave it out"
                )
            from performers.models import PerformerConfig

            if isinstance(model.config, PerformerConfig):
                from performers.convert.families.performer_models import PerformerModels

                return PerformerModels(model, conversion)
            from performers.convert.families.transformers_models import TransformersModels

            return TransformersModels(model, conversion)
        _check_no_wrapper(model, PreTrainedModel)
    if example is not None:
        from performers.convert.families.sdpa import SdpaModules

        return SdpaModules(model, conversion, example)
    from performers.convert.families.torch_modules import TorchModules

    return TorchModules(model, conversion)


def _check_no_wrapper(model: nn.Module, kind: type) -> None:
    """Refuse a module around a transformers model, and name the model to pass instead."""
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return
    for name, module in model.named_modules():
        if isinstance(module, kind):
            parts = (f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
            raise ValueError(
                f"model is a {type(model).__name__} around a {type(module).__name__}: pass the "
                f"transformers model itself, model{''.join(parts)}, which is converted in place"
            )
