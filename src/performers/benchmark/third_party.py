"""Adapters of other linear-attention libraries, imported only when they are built.

They are measured as their authors document them: the positive softmax features or the generalized
relu features of each, a projection drawn once, no redraws between calls. They compute something
else than this package (a stabiliser over the whole sequence, an epsilon, another estimator), so
their outputs are checked for shape and finiteness only.
"""

import contextlib
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from performers.benchmark.workload import Workload

NOT_INSTALLED = "not installed"
# More calls than a benchmark makes; the library draws at the first.
_NEVER = 2**31


def absence(module: str) -> str | None:
    """Why a library cannot be used, or None: whether it is installed, without importing it."""
    return None if importlib.util.find_spec(module) else NOT_INSTALLED


def fla_absence() -> str:
    """Why flash-linear-attention cannot be measured: this benchmark runs on the processor."""
    if absence("fla"):
        return NOT_INSTALLED
    return "needs a GPU: its kernels do not run on a processor, which is what is measured here"


def performer_pytorch(workload: Workload, is_causal: bool) -> Callable[..., Tensor]:
    """``FastAttention`` of performer-pytorch.

    Without the CUDA extension its causal mode is a loop over 128 pieces of the sequence that forms
    the m x d sum of every position.

    Args:
        workload: Shapes and features.
        is_causal: Whether attention is causal.

    Returns:
        A function of query, key and value.

    Raises:
        ImportError: The library is missing.
    """
    library = _import("performer_pytorch")
    torch.manual_seed(workload.seed)
    # It prints whether it found its CUDA extension.
    with contextlib.redirect_stdout(io.StringIO()):
        attention = library.FastAttention(
            dim_heads=workload.head_dim,
            nb_features=workload.num_features,
            causal=is_causal,
            generalized_attention=workload.features == "relu",
        )
    return attention.to(workload.torch_dtype)


def fast_transformers(workload: Workload, is_causal: bool) -> Callable[..., Tensor]:
    """``LinearAttention`` or ``CausalLinearAttention`` of pytorch-fast-transformers.

    Its layout is ``(batch, length, heads, head_dim)``; the transposed views are passed as they are.
    ``Favor`` draws half the features and uses each with both signs.

    Args:
        workload: Shapes and features.
        is_causal: Whether attention is causal.

    Returns:
        A function of query, key and value.

    Raises:
        ImportError: The library is missing.
    """
    maps = _import("fast_transformers.feature_maps")
    layers = _import("fast_transformers.attention")
    masking = _import("fast_transformers.masking")
    torch.manual_seed(workload.seed)
    if workload.features == "softmax":
        features = partial(maps.Favor, n_dims=workload.num_features, redraw=_NEVER)
    else:
        features = partial(
            maps.GeneralizedRandomFeatures,
            n_dims=workload.num_features,
            softmax_temp=workload.head_dim**-0.5,
            redraw=_NEVER,
        )
    layer = layers.CausalLinearAttention if is_causal else layers.LinearAttention
    attention = layer(workload.head_dim, feature_map=features)
    with warnings.catch_warnings():
        # Its projection is drawn with a function that torch deprecates.
        warnings.simplefilter("ignore")
        attention.feature_map.new_feature_map(torch.device("cpu"))
    attention.to(workload.torch_dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, _, length, _ = query.shape
        lengths = masking.LengthMask(torch.full((batch,), length), max_len=length)
        if is_causal:
            mask = masking.TriangularCausalMask(length)
        else:
            mask = masking.FullMask(length)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return attention(query, key, value, mask, lengths, lengths).transpose(1, 2)

    return attend


def fla(workload: Workload, is_causal: bool) -> Callable[..., Tensor]:
    """Refuse: flash-linear-attention runs on a GPU only.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(f"fla: {fla_absence()}")


def _import(name: str) -> Any:
    # Warnings of other people's code on import are not the user's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
