"""Trainings of studies: first weights, steps, and the cost of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from performers.benchmark.memory import peak_of
from performers.models import PerformerForCausalLM
from performers.models.positions import rotary_angles, rotate


def descend(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float | None = None,
) -> float:
    """One step down the gradient of a loss, whose norm is ``clip`` at most; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        parameters = [x for group in optimizer.param_groups for x in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    if schedule is not None:
        schedule.step()
    return loss.item()


def cost(call: Callable[[], object]) -> tuple[float, int]:
    """Processor seconds of a call, and the rise of memory to its peak in bytes."""
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        started = time.process_time()
        call()
        seconds = time.process_time() - started

    nbytes = peak_of(timed).nbytes
    return seconds, nbytes


def look_back_(model: PerformerForCausalLM, distances: Sequence[int]) -> None:
    """Set biases of queries and keys so that heads prefer tokens at distances, in turns.

    The query's is 3 in half of the dimensions and the key's is the same rotated by the distance,
    so that their product is largest there. Where queries serve as keys, the distance is 0.

    Args:
        model: Model with rotary positions.
        distances: Tokens back, of the first head, the second and so on, from the start again where
            there are more heads.
    """
    config, performer = model.config, model.performer
    layers: Any = performer.layers
    query = torch.zeros(1, 1, 1, config.head_dim)
    query[..., : config.head_dim // 2] = 3.0
    with torch.no_grad():
        for layer in layers:
            # Parts, heads, dimensions: the last part is that of values.
            bias = layer.attention.query_key_value.bias
            parts = bias.view(-1, config.num_attention_heads, config.head_dim)
            parts[0] = query
            if len(parts) < 3:
                continue
            for head in range(config.num_attention_heads):
                place = torch.tensor([[distances[head % len(distances)]]])
                angles = rotary_angles(place, config.head_dim, config.rope_theta)
                parts[1, head] = rotate(query, angles).flatten()
