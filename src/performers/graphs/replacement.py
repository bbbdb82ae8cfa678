"""Replacement of the attention of ``GPSConv``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch_geometric.nn import GPSConv
from torch_geometric.nn.attention import PerformerAttention

from performers.convert.families.torch_modules import TorchModules, TorchSite, not_replaceable
from performers.convert.options import Conversion
from performers.convert.to_performer import convert
from performers.features import GeneralizedFeatures
from performers.features.projections import Projection
from performers.features.softmax import Estimator
from performers.graphs.attention import GraphAttention
from performers.nn import FavorAttention

Model = TypeVar("Model", bound=nn.Module)


def replace_(
    model: Model,
    *,
    num_features: int | None = None,
    projection: Projection = "orthogonal",
    estimator: Estimator | None = None,
    calibration: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Replace the attention of every ``GPSConv`` in a model, in place.

    Weights stay as they are. With ``attn_type="performer"`` a layer gets a `GraphAttention` with
    the same kernel; with ``attn_type="multihead"`` a ``PerformerAttention`` with softmax features,
    as `to_performer` installs it. Attention outside of ``GPSConv`` is left alone.

    Args:
        model: A model with layers ``torch_geometric.nn.GPSConv``, or one of them.
        num_features: Length of a feature vector; None: the default of the feature map.
        projection: As in ``SoftmaxFeatures``.
        estimator: As in ``SoftmaxFeatures``, for ``attn_type="multihead"``; None: ``"positive"``.
        calibration: As in `to_performer`, for ``attn_type="multihead"``.
        generator: Generator of the projections; None: torch's default.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: There is no ``GPSConv`` to change, its attention cannot be replaced,
            ``estimator`` or ``calibration`` has no layer to act on, or an argument is out of range;
            the model is then unchanged.

    Example:
        >>> layer = GPSConv(64, conv=None, heads=4, attn_type="performer")
        >>> type(replace_(layer).attn).__name__
        'GraphAttention'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    conversion = Conversion(
        num_features=num_features, projection=projection, estimator=estimator or "positive"
    )
    # Refuse unknown estimators and projections before the model is inspected.
    conversion.features(8, 1, torch.Generator())
    layers = [layer for layer in model.modules() if isinstance(layer, GPSConv)]
    family = _MultiheadLayers(model, conversion)
    multihead = family.sites()
    performers = _attentions(model, PerformerAttention)
    if not multihead and not performers:
        problem = "is replaced already" if layers else "has no torch_geometric.nn.GPSConv"
        raise ValueError(f"{type(model).__name__} has nothing to replace: it {problem}")
    for unused, value in (("estimator", estimator), ("calibration", calibration)):
        if value is not None and not multihead:
            raise ValueError(
                f'{unused} is for layers with attn_type="multihead", and there is none: leave it '
                "out, or set GPSConv.attn to a GraphAttention with feature_map=SoftmaxFeatures(...)"
            )
    for name, module, kind in (
        *((site.name, site.module, nn.MultiheadAttention) for site in multihead),
        *((name, module, PerformerAttention) for module, name in performers.items()),
    ):
        if (reason := not_replaceable(module, kind)) is not None:
            raise ValueError(f"{name} ({type(module).__name__}) {reason}")
    ours = {x: _with_parameters_of(x, conversion, generator) for x in performers}
    if multihead:
        convert(family, calibration, generator)
    for layer in layers:
        layer.attn = ours.get(layer.attn, layer.attn)
    return model


class _MultiheadLayers(TorchModules):
    """The ``nn.MultiheadAttention`` of ``GPSConv`` alone; there may be none."""

    def sites(self) -> list[TorchSite]:
        """List the modules in the order of ``named_modules``."""
        return [
            TorchSite(name, module, False, module.head_dim, module.num_heads)
            for module, name in _attentions(self.model, nn.MultiheadAttention).items()
        ]


def _attentions(model: nn.Module, kind: type[nn.Module]) -> dict[Any, str]:
    """Names of the attentions of one kind in ``GPSConv`` that are not replaced yet."""
    return {
        layer.attn: f"{name}.attn".lstrip(".")
        for name, layer in model.named_modules()
        if isinstance(layer, GPSConv)
        and isinstance(layer.attn, kind)
        and not isinstance(layer.attn, (FavorAttention, GraphAttention))
    }


def _with_parameters_of(
    module: Any, conversion: Conversion, generator: torch.Generator | None
) -> GraphAttention:
    """Build the replacement of a ``PerformerAttention`` of PyTorch Geometric."""
    features = GeneralizedFeatures(
        module.head_channels,
        conversion.num_features,
        fn="relu" if isinstance(module.kernel, nn.ReLU) else module.kernel,
        projection=conversion.projection,
        generator=generator,
    )
    # On meta, parameters that are replaced take no memory and no random numbers.
    with torch.device("meta"):
        ours = GraphAttention(
            module.attn_out.out_features, module.heads, module.head_channels, feature_map=features
        )
    for name in ("q", "k", "v", "attn_out", "dropout"):
        setattr(ours, name, getattr(module, name))
    weight = module.q.weight
    ours.feature_map.to(weight.device, weight.dtype)
    ours.training = module.training
    ours.feature_map.train(module.training)
    return ours
