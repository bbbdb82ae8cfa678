"""Times of attention and of training steps, and the memory of the latter."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from performers import use_backend
from performers.benchmark.timing import threads_of_torch
from performers.cli.console import note
from performers.models import PerformerConfig, PerformerForCausalLM
from performers.models.context import AttentionContext
from studies.parts import Part
from studies.sparse.attentions import ALL, BY_CONTENT, EXACT, SOFTMAX, mechanism, settings
from studies.training import cost

PLAIN = "Performer, softmax, plain torch"
"""The Performer without its compiled kernels."""
_GROWTH = 16


@dataclass(frozen=True)
class TimeSize:
    """Sizes of the times."""

    length: int = 4096
    keys: int = 64
    heads: int = 8
    head_dim: int = 64
    rounds: int = 5
    threads: int = 2
    # Lengths of training steps, with the root of the length for keys, and most seconds of one.
    steps: tuple[int, ...] = (1024, 4096, 16384, 65536)
    limit: float = 60.0


def measure_times(size: TimeSize) -> Part:
    """Times of all attentions in turns, as ratios to exact attention's in the same round.

    Returns:
        By attention ``forward`` and ``both`` (with the backward pass): lists of seconds, an entry
        a round, and ``processor``: processor seconds of ``both``.
    """
    found: dict[str, Any] = {}
    with threads_of_torch(size.threads):
        calls = {name: _attention(name, size) for name in (*ALL, PLAIN)}
        for call in calls.values():
            call(True)
        for number in range(size.rounds):
            order = list(calls)
            random.Random(number).shuffle(order)
            for name in order:
                times = found.setdefault(name, {"forward": [], "both": [], "processor": []})
                started = time.perf_counter()
                calls[name](False)
                times["forward"].append(time.perf_counter() - started)
                started, processor = time.perf_counter(), time.process_time()
                calls[name](True)
                times["both"].append(time.perf_counter() - started)
                times["processor"].append(time.process_time() - processor)
            note(f"times: round {number + 1} of {size.rounds}")
    return found


def _attention(name: str, size: TimeSize) -> Callable[[bool], None]:
    torch.manual_seed(0)
    setting = settings(size.length, size.keys, is_causal=True)[SOFTMAX if name == PLAIN else name]
    module = mechanism(setting, size.heads, size.head_dim, size.length, is_causal=True).train()
    query, key, value = torch.randn(3, 1, size.heads, size.length, size.head_dim)
    key = query if name in BY_CONTENT else key
    context = AttentionContext(is_causal=True)

    def call(backward: bool) -> None:
        tensors = [x.clone().requires_grad_(backward) for x in (query, key, value)]
        backend = use_backend("torch") if name == PLAIN else nullcontext()
        with backend:
            out = module(*tensors, context, 0)[0]
            if backward:
                out.sum().backward()

    return call


def measure_step(name: str, size: TimeSize) -> Part:
    """Processor seconds and peak memory of a training step against the length.

    Returns:
        By length as text ``seconds`` and ``nbytes``; those of exact attention that would take
        longer than the limit, by the square of the length, are left out.
    """
    found: dict[str, Any] = {}
    last = 0.0
    for length in size.steps:
        if name == EXACT and last * _GROWTH > size.limit:
            break
        step = _training_step(name, length)
        if not found:
            step()
        last, nbytes = cost(step)
        found[str(length)] = {"seconds": last, "nbytes": nbytes}
        note(f"training step, {name}, {length} tokens: {last:.2f} s")
    return found


def _training_step(name: str, length: int) -> Callable[[], None]:
    """A step of a model of one layer on one row."""
    torch.manual_seed(0)
    config = PerformerConfig(
        **settings(length, math.isqrt(length), is_causal=True)[name],
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        is_decoder=True,
    )
    model = PerformerForCausalLM(config).train()
    ids = torch.randint(1, 32, (1, length))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()

    return step
