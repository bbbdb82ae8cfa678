"""Tools of the tests of the compiled kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from performers.attention.native import library
from performers.attention.native.operators import Inputs, favor_forward
from tests.attention.cases import Call

REASON = library.unavailable_reason()
NATIVE = pytest.mark.skipif(REASON is not None, reason=f"no native library: {REASON}")


def operator_arguments(call: Call, part: str = "whole", **options: object) -> Inputs:
    """The arguments of ``performers::favor_forward`` for a call."""
    return Inputs.of(call.checked(**options), part)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def exact_rows(call: Call) -> Tensor:
    """Which rows the kernels summed at a scale of their own, ``(B, Hkv, G, L)``, bool."""
    return favor_forward(*operator_arguments(call))[2] < 0


def dense_in_logarithms(call: Call) -> Tensor:
    """The call's output in float64, every pair of features summed as a logarithm.

    Nothing is multiplied out, so no pair is lost however long the vectors are; exponential
    features only, memory ``heads * L * S * num_features``.
    """
    heads, head_dim = call.query.shape[1], call.query.shape[3]
    groups = heads // call.key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (call.key, call.value))
    root = head_dim**-0.25
    log_q, _ = call.case.log_phi(call.feature_map, call.query.double() * root, is_query=True)
    log_k, _ = call.case.log_phi(call.feature_map, key * root)
    pairs = torch.logsumexp(log_q.unsqueeze(-2) + log_k.unsqueeze(-3), -1)
    window = call.options.get("window")
    if window is not None:
        position = torch.arange(pairs.shape[-1])
        near = (position[:, None] - position).abs() <= window
        pairs = torch.where(near, call.query.double() @ key.mT * root**2, pairs)
    seen = torch.ones(pairs.shape[-2:], dtype=torch.bool)
    if call.options.get("is_causal"):
        seen = seen.tril()
    if call.options.get("key_mask") is not None:
        seen = seen & call.options["key_mask"][:, None, None, :]
    pairs = pairs.masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)
    matrix = pairs.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return matrix @ value


def largest_exponent(call: Call) -> float:
    """The largest number that is subtracted from another inside an exponent.

    Float32 knows an exponent to ``6e-8`` times this, which is the error that every
    implementation in float32 has relative to the weights of attention.
    """
    root = call.query.shape[-1] ** -0.25
    size = 0.0
    for x in (call.query, call.key):
        x = x.double() * root
        weight = call.feature_map.weight.double().flatten(0, 1)
        size = max(size, (x @ weight.mT).abs().max().item(), x.square().sum(-1).max().item() / 2)
    return size
