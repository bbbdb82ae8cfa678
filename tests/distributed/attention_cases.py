"""Attention of one row over processes against one process, for every kind of call."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import performers
from performers.attention.backends import backends
from performers.distributed import sequence_parallel

# Options of `attention_errors`; lengths are those of the first two ranks.
CASES = {
    "plain": {},
    "window": {"window": 7},
    "window 0": {"window": 0},
    "sinks": {"sinks": 3},
    "window and sinks": {"window": 7, "sinks": 3},
    "mask": {"masked": True},
    "mask, window and sinks": {"masked": True, "window": 7, "sinks": 3},
    "sinks beyond the first shard": {"sinks": 4, "first_masked": True},
    "packed": {"ends": (0, 11, 52, 52, 70, 96)},
    "packed, one sequence over all": {"ends": (0, 96), "window": 5},
    "packed at the edge": {"ends": (0, 20, 48, 96), "window": 7, "sinks": 2},
    "packed, window and sinks": {"ends": (0, 11, 52, 60, 96), "window": 7, "sinks": 3},
    "packed and masked": {"ends": (0, 11, 52, 60, 96), "window": 7, "sinks": 3, "masked": True},
    "uneven": {"lengths": (61, 35), "window": 7, "sinks": 2},
    "last shard within the window": {"lengths": (93, 3), "window": 9},
    "window across both": {"lengths": (50, 46), "window": 46},
    "relu": {"features": "relu"},
    # Its normalisers can be small, and float32 then loses digits in one process, too.
    "trigonometric": {"features": "trigonometric", "dtype": torch.float64},
    "grouped heads": {"key_heads": 2, "window": 7},
    "a projection for each head": {"key_heads": 2, "num_heads": 4, "window": 7},
    "balanced estimator": {"features": "data_aware", "window": 7, "sinks": 2},
    "trained features": {"features": "learned", "window": 7},
    "float64": {"dtype": torch.float64, "window": 7, "sinks": 2},
    "no key in the first shard": {"masked": True, "hidden": 48, "window": 7, "sinks": 2},
    "bfloat16": {"dtype": torch.bfloat16, "window": 7, "sinks": 2},
    "checkpoint": {"checkpointed": True, "window": 7, "sinks": 2},
    "torch": {"backend": "torch", "window": 7, "sinks": 2},
}

CALLS = [(direction, name) for name in CASES for direction in ("causal", "bidirectional")]
# Every other call: either direction meets every kind of options. Of checkpoints both.
BY_DEFAULT = [("causal" if n % 2 else "bidirectional", name) for n, name in enumerate(CASES)]
BY_DEFAULT += [("bidirectional", "checkpoint")]


def make_features(kind: str, num_heads: int | None, dtype: torch.dtype) -> torch.nn.Module:
    """Features of 8 dimensions, drawn alike on all ranks."""
    generator = torch.Generator().manual_seed(1)
    if kind == "relu":
        return performers.GeneralizedFeatures(8, 32, fn="relu", generator=generator).to(dtype)
    estimator = kind if kind in ("trigonometric", "data_aware") else "positive"
    features = performers.SoftmaxFeatures(
        8, 32, estimator=estimator, num_heads=num_heads, generator=generator
    )
    if kind == "data_aware":
        features.calibrate_(*torch.randn(2, 1, 4, 50, 8, generator=generator).unbind(0))
    return (performers.LearnedFeatures(features) if kind == "learned" else features).to(dtype)


def attention_errors(
    rank: int,
    world: int,
    is_causal: bool,
    *,
    lengths: tuple[int, ...] | None = None,
    masked: bool = False,
    first_masked: bool = False,
    hidden: int = 0,
    ends: tuple[int, ...] | None = None,
    features: str = "softmax",
    key_heads: int = 4,
    num_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    checkpointed: bool = False,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> dict[str, float]:
    """Largest error of the output and of each gradient, relative to the largest entry.

    ``options`` are those of ``favor_attention``.
    """
    lengths = lengths if lengths and len(lengths) == world else (96 // world,) * world
    total = sum(lengths)
    generator = torch.Generator().manual_seed(7)
    batch = 1 if ends else 2

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(batch, heads, total, 8, generator=generator, dtype=dtype)

    whole = [draw(4), draw(key_heads), draw(key_heads)]
    upstream = draw(4)
    mask = None
    if masked or first_masked:
        mask = torch.rand(batch, total, generator=generator) < 0.7
        mask[:, -5:] = False
        mask[:, :hidden] = False
        if first_masked:
            # Two sinks are left for the second shard in one row, none in the other.
            mask[0, : lengths[0]] = torch.arange(lengths[0]) % 20 == 3
            mask[-1, 2:7] = True
    feature_map = make_features(features, num_heads, torch.promote_types(dtype, torch.float32))
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    options["is_causal"] = is_causal

    for x in whole:
        x.requires_grad_()
    expected = performers.favor_attention(
        *whole, feature_map, key_mask=mask, cu_seqlens=cu_seqlens, **options
    )
    trained = list(feature_map.parameters())
    expected_grads = torch.autograd.grad((expected * upstream).sum(), [*whole, *trained])

    start = sum(lengths[:rank])
    here = slice(start, start + lengths[rank])
    local = [x.detach()[:, :, here].clone().requires_grad_() for x in whole]
    local_mask = None if mask is None else mask[:, here]

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return performers.favor_attention(*tensors, feature_map, key_mask=local_mask, **options)

    with sequence_parallel(group, cu_seqlens=cu_seqlens):
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(attend, *local, use_reentrant=False)
        else:
            out = attend(*local)
        grads = torch.autograd.grad((out * upstream[:, :, here]).sum(), [*local, *trained])
    errors = {"out": relative(out, expected[:, :, here], expected)}
    for name, grad, full in zip(("query", "key", "value"), grads, expected_grads, strict=False):
        errors[name] = relative(grad, full[:, :, here], full)
    for grad, full in zip(grads[3:], expected_grads[3:], strict=True):
        grad = grad.clone()
        dist.all_reduce(grad)
        errors["features"] = relative(grad, full, full)
    return errors


def relative(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> float:
    """Largest difference, over the largest entry of ``scale``; infinite if shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return ((found - expected).abs().max() / scale.abs().max()).item()


def nonfinite_errors(rank: int) -> dict[str, float]:
    """Rows of a call with NaN in a key of rank 1 that are NaN, or not, unlike in one process."""
    generator = torch.Generator().manual_seed(7)
    query, key, value = torch.randn(3, 1, 2, 32, 8, generator=generator).unbind(0)
    key[:, 0, 20] = torch.nan
    features, here = make_features("softmax", None, torch.float32), slice(16 * rank, 16 * rank + 16)
    wrong = {}
    for is_causal in (True, False):
        for window in (None, 3):
            options = {"is_causal": is_causal, "window": window}
            expected = performers.favor_attention(query, key, value, features, **options)
            with sequence_parallel():
                out = performers.favor_attention(
                    *(x[:, :, here] for x in (query, key, value)), features, **options
                )
            unlike = out.isnan() != expected[:, :, here].isnan()
            wrong[f"causal={is_causal}, window={window}"] = float(unlike.sum())
    return wrong


def message_bytes(length: int) -> float:
    """Bytes that a rank publishes for a bidirectional call with a window."""
    query = torch.randn(1, 4, length, 8)
    with sequence_parallel() as parallel:
        performers.favor_attention(
            query, query, query, make_features("softmax", None, torch.float32), window=7
        )
    return float(parallel.message_bytes)


def all_errors(rank: int, world: int, *, every: bool) -> dict[str, dict[str, float]]:
    """Errors of all cases, or of those that run by default, by name."""
    found = {
        f"{direction}: {name}": attention_errors(rank, world, direction == "causal", **CASES[name])
        for direction, name in CALLS
        if every or (direction, name) in BY_DEFAULT
    }
    for name in backends():
        found[f"backend {name}"] = attention_errors(
            rank, world, True, window=7, sinks=2, backend=name
        )
    found["a dimension of a mesh"] = mesh_errors((1, world))
    found["not finite"] = nonfinite_errors(rank)
    found["message"] = {"bytes": message_bytes(48), "of a longer row": message_bytes(480)}
    return found


def mesh_errors(shape: tuple[int, int]) -> dict[str, float]:
    """Errors of rows over the second dimension of a mesh."""
    group = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "sp"))["sp"].get_group()
    return attention_errors(
        dist.get_rank(group), shape[1], False, group=group, window=7, sinks=3, masked=True
    )


def errors_between(rank: int, world: int) -> dict[str, dict[str, float]]:
    """Errors where there are ranks between others."""
    options = {"window": 7, "sinks": 3, "masked": True}
    lengths = (31, 7, 58) if world == 3 else (31, 7, 55, 2)
    found = {
        f"{name}, causal={is_causal}": attention_errors(rank, world, is_causal, **options, **more)
        for name, more in (
            ("one row", {}),
            ("uneven", {"lengths": lengths}),
            ("packed", {"ends": (0, 11, 30, 75, 96)}),
        )
        for is_causal in (True, False)
        if world > 3 or (name == "uneven") == is_causal
    }
    return {**found, "a dimension of a mesh": mesh_errors((2, 2))} if world == 4 else found
