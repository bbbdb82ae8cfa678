"""Random inputs and feature maps of a workload."""

from typing import NamedTuple

import torch
from torch import Tensor

from performers.benchmark.settings import Workload
from performers.features import FeatureMap, GeneralizedFeatures, SoftmaxFeatures


class Inputs(NamedTuple):
    """Standard normal tensors of one call, each of shape ``(batch, heads, length, head_dim)``."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


def dtype_of(workload: Workload) -> torch.dtype:
    """The dtype of queries, keys and values."""
    dtype: torch.dtype = getattr(torch, workload.dtype)
    return dtype


def make_inputs(
    workload: Workload, length: int, *, requires_grad: bool = False, offset: int = 0
) -> Inputs:
    """Random tensors, the same for the same seed, offset and length on every device."""
    generator = torch.Generator().manual_seed(workload.seed + offset)
    shape = (workload.batch, workload.heads, length, workload.head_dim)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).to(workload.device, dtype_of(workload))

    query, key, value = (draw().requires_grad_(requires_grad) for _ in range(3))
    return Inputs(query, key, value, draw())


def make_features(workload: Workload) -> FeatureMap:
    """Random features, the same for the same seed."""
    generator = torch.Generator().manual_seed(workload.seed)
    sizes = (workload.head_dim, workload.num_features)
    if workload.features == "relu":
        return GeneralizedFeatures(*sizes, fn="relu", generator=generator).to(workload.device)
    return SoftmaxFeatures(*sizes, generator=generator).to(workload.device)
