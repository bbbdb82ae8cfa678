"""The attention functions that are compared, each an entry of one list.

Other libraries are imported only when they are built, and measured as their authors document them:
their positive softmax or generalized relu features, a projection drawn once, no redraws between
calls. They compute something else than this package (a stabiliser over the whole sequence, an
epsilon, another estimator), so their outputs are checked for shape and finiteness only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from performers import backends, favor_attention
from performers.benchmark.cases.inputs import dtype_of, make_features
from performers.benchmark.settings import Workload

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From query, key and value, each ``(batch, heads, length, head_dim)``, to the same shape."""

SDPA, IDENTITY, PERFORMER_PYTORCH = "SDPA", "identity", "performer-pytorch"
_SDPA_KERNELS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
CAUSAL_CHUNK = 64
"""Tokens in a block of chunked causal attention, as the counts of operations assume."""

# More calls than a benchmark makes; the library draws at the first.
_NEVER = 2**31


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention.

    Attributes:
        name: Name in tables.
        build: Makes the function, from a workload and whether attention is causal.
        flops: Operations of a forward pass, from a workload, the length and whether it is causal;
            None where counting says nothing.
        growth: Time grows with the length to this power.
        backend: Name of the backend of this package.
        absence: Why it cannot run, or None.
    """

    name: str
    build: Callable[[Workload, bool], Attention]
    flops: Callable[[Workload, int, bool], int] | None
    growth: int = 1
    backend: str | None = None
    absence: str | None = None


def contestants(device: str = "cpu") -> dict[str, Contestant]:
    """All contestants by name, in the order of tables.

    The backends are those usable here on the device, without the quadratic reference. What is not
    installed, or does not run on the device, has the reason in ``absence``.
    """
    is_cpu = torch.device(device).type == "cpu"
    elsewhere = "triton" if is_cpu else "native"
    needs_gpu = "needs a GPU: --device cuda" if is_cpu else None
    entries = [
        Contestant(f"performers {name}", partial(favor, name), favor_flops, backend=name)
        for name in backends()
        if name not in ("reference", elsewhere)
    ]
    entries += [
        Contestant(SDPA, _sdpa, exact_flops, growth=2),
        *(
            Contestant(name, partial(_sdpa_of, kernel), exact_flops, growth=2, absence=needs_gpu)
            for name, kernel in _SDPA_KERNELS.items()
        ),
        Contestant(IDENTITY, _identity, None),
        Contestant(
            PERFORMER_PYTORCH,
            _performer_pytorch,
            _prefix_flops,
            absence=absence("performer_pytorch"),
        ),
        Contestant(
            "fast-transformers",
            _fast_transformers,
            _hyperbolic_flops,
            absence=absence("fast_transformers"),
        ),
        Contestant("fla", _fla, favor_flops, absence=absence("fla") or needs_gpu),
    ]
    return {entry.name: entry for entry in entries}


def favor(backend: str, workload: Workload, is_causal: bool) -> Attention:
    """``favor_attention`` through a named backend."""
    feature_map = make_features(workload)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return favor_attention(query, key, value, feature_map, is_causal=is_causal, backend=backend)

    return attend


def _sdpa(workload: Workload, is_causal: bool) -> Attention:
    return partial(F.scaled_dot_product_attention, is_causal=is_causal)


def _sdpa_of(kernel: SDPBackend, workload: Workload, is_causal: bool) -> Attention:
    """`SDPA` by one kernel alone, where it raises what it does not cover."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    return attend


def _identity(workload: Workload, is_causal: bool) -> Attention:
    # A copy is the least that anything which writes an output can do.
    return lambda query, key, value: value.clone()


def _performer_pytorch(workload: Workload, is_causal: bool) -> Attention:
    """``FastAttention`` of performer-pytorch.

    Without the CUDA extension its causal mode is a loop over 128 pieces of the sequence that forms
    the m x d sum of every position.
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
    built: Attention = attention.to(workload.device, dtype_of(workload))
    return built


def _fast_transformers(workload: Workload, is_causal: bool) -> Attention:
    """``LinearAttention`` or ``CausalLinearAttention`` of pytorch-fast-transformers.

    Its layout is ``(batch, length, heads, head_dim)``; the transposed views are passed as they are.
    ``Favor`` draws half the features and uses each with both signs.
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
        attention.feature_map.new_feature_map(torch.device(workload.device))
    attention.to(workload.device, dtype_of(workload))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, _, length, _ = query.shape
        lengths = masking.LengthMask(torch.full((batch,), length), max_len=length)
        mask = masking.TriangularCausalMask(length) if is_causal else masking.FullMask(length)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return attention(query, key, value, mask, lengths, lengths).transpose(1, 2)

    return attend


def _fla(workload: Workload, is_causal: bool) -> Attention:
    """``chunk_linear_attn`` of flash-linear-attention on features computed by torch.

    It has no bidirectional form and no feature map of this kind. The features are not stabilised,
    which standard normal inputs allow.
    """
    if not is_causal:
        raise RuntimeError("fla has no bidirectional form")
    chunk_linear_attn = _import("fla.ops.linear_attn").chunk_linear_attn
    feature_map = make_features(workload)
    dtype = dtype_of(workload)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        phi = feature_map(query, is_query=True), feature_map(key)
        phi_q, phi_k = (x.transpose(1, 2).to(dtype) for x in phi)
        out, _ = chunk_linear_attn(phi_q, phi_k, value.transpose(1, 2), scale=1.0, normalize=True)
        return out.transpose(1, 2)

    return attend


def absence(module: str) -> str | None:
    """The reason why a library cannot be used, or None, without importing it."""
    return None if importlib.util.find_spec(module) else "not installed"


def _import(name: str) -> Any:
    # Warnings of other people's code on import are not the user's.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


# Operations: a multiplication and an addition for each product that the mathematics asks for.
# Exponentials, normalisers and what a backward pass recomputes do not count, so that GFLOP/s
# compare the speed of kernels and not their waste.


def favor_flops(workload: Workload, length: int, is_causal: bool) -> int:
    """Operations of linear attention's forward pass.

    Projections of queries and keys, ``S = phi(k)^T v`` and ``phi(q) S`` take ``2 L m D`` each.
    Chunked causal attention adds, inside blocks of ``C`` tokens, the lower half of
    ``phi(q) phi(k)^T`` and of its product with ``v``: ``L C (m + D)``.
    """
    features, head_dim = workload.num_features, workload.head_dim
    count = 8 * length * features * head_dim
    if is_causal:
        count += length * min(CAUSAL_CHUNK, length) * (features + head_dim)
    return workload.batch * workload.heads * count


def exact_flops(workload: Workload, length: int, is_causal: bool) -> int:
    """Operations of softmax attention's forward pass: ``4 L^2 D`` a head, causal half of it."""
    count = workload.batch * workload.heads * 4 * length * length * workload.head_dim
    return count // 2 if is_causal else count


def pass_flops(forward: int, passes: str) -> int:
    """Operations of ``"forward"`` or ``"forward+backward"``, given those of the forward pass.

    The backward pass has twice the forward's, one product for each factor. The gradients of the
    projections are not wanted, but both projections are computed again because features are not
    kept, so the rule holds for linear attention too.
    """
    return {"forward": 1, "forward+backward": 3}[passes] * forward


def _prefix_flops(workload: Workload, length: int, is_causal: bool) -> int:
    # Prefix sums position by position: the same products, causal or not.
    return favor_flops(workload, length, False)


def _hyperbolic_flops(workload: Workload, length: int, is_causal: bool) -> int:
    count = _prefix_flops(workload, length, is_causal)
    # Half as many projections, each used with both signs.
    return count - count // 4 if workload.features == "softmax" else count
