"""``PerformerAttention`` computed densely from its own weights, in float64."""

import torch
from torch import Tensor
from torch.nn import functional as F

from performers import PerformerAttention
from tests.attention import oracle
from tests.features.cases import by_name


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(N, L, E)`` to ``(N, heads, L, E / heads)``."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def dense(
    module: PerformerAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    ignore: Tensor | None = None,
    is_causal: bool = False,
    case: str = "positive",
) -> tuple[Tensor, Tensor]:
    """Output ``(N, L, E)`` and weights ``(N, heads, L, S)`` for batch-first inputs.

    Args:
        module: With ``kdim == vdim == embed_dim`` or not, with or without biases; without
            ``add_bias_kv`` and ``add_zero_attn``.
        query: Shape ``(N, L, E)``.
        key: Shape ``(N, S, kdim)``.
        value: Shape ``(N, S, vdim)``.
        ignore: Shape ``(N, S)``, True = ignore.
        is_causal: Causal.
        case: Name of the feature map's case.
    """
    parameters = {name: p.detach().double() for name, p in module.named_parameters()}
    width = module.embed_dim
    if "in_proj_weight" in parameters:
        matrices = parameters["in_proj_weight"].split(width)
    else:
        matrices = [parameters[f"{name}_proj_weight"] for name in "qkv"]
    biases = parameters.get("in_proj_bias", torch.zeros(3 * width).double()).split(width)
    q, k, v = (
        split_heads(x.double() @ w.T + b, module.num_heads)
        for x, w, b in zip((query, key, value), matrices, biases, strict=True)
    )
    weights, _ = oracle.weights(
        by_name(case),
        module.feature_map,
        q,
        k,
        key_mask=None if ignore is None else ~ignore,
        is_causal=is_causal,
    )
    out = (weights @ v).transpose(1, 2).flatten(2)
    bias = parameters.get("out_proj.bias")
    return F.linear(out, parameters["out_proj.weight"], bias), weights
