"""Training steps on one row that is cut over the processes of a group."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from performers.benchmark.memory import peak_of
from performers.distributed import count_labels, sequence_parallel, shard
from performers.models import PerformerConfig, PerformerForCausalLM


def make_model() -> PerformerForCausalLM:
    """A causal model of two layers with window and sinks, the same in all processes."""
    torch.manual_seed(0)
    config = PerformerConfig(
        vocab_size=30,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_features=64,
        position_embedding="rotary",
        window=64,
        sinks=4,
        hidden_dropout_prob=0.0,
        use_cache=False,
    )
    return PerformerForCausalLM(config)


def train(folder: Path, length: int, steps: int) -> dict[str, Any] | None:
    """Train, compare with the run of one process if its parameters are in the folder.

    Returns:
        In the first process losses, seconds of the fastest step, MiB that the largest process took
        for training, bytes that a process publishes for a layer, and the errors; else None.
    """
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        store = Path(tempfile.mkdtemp()) / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    world, rank = dist.get_world_size(), dist.get_rank()
    model = make_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ids = torch.randint(3, 30, (1, length), generator=torch.Generator().manual_seed(1))
    batch = shard({"input_ids": ids, "labels": ids}, is_causal=True)
    losses, seconds, sent = [], [], 0

    def run() -> None:
        nonlocal sent
        for _ in range(steps):
            start = time.perf_counter()
            with sequence_parallel() if world > 1 else nullcontext() as parallel:
                loss = model(**batch, num_items_in_batch=count_labels(batch["labels"])).loss
                loss.backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(_summed(loss))
            seconds.append(time.perf_counter() - start)
            sent = 0 if parallel is None else parallel.message_bytes

    used = torch.tensor(peak_of(run).nbytes)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    seen: dict[str, Any] = {
        "length": length,
        "losses": losses,
        "seconds": min(seconds),
        "mebibytes": used.item() / 2**20,
        "message_bytes": sent,
    }
    alone = folder / f"{length}.pt"
    if world == 1:
        torch.save({"losses": losses, "parameters": model.state_dict()}, alone)
    elif alone.exists():
        expected = torch.load(alone)
        seen["loss_error"] = max(
            abs(a - b) / abs(b) for a, b in zip(losses, expected["losses"], strict=True)
        )
        parameters = expected["parameters"]
        seen["parameter_error"] = max(
            ((x - parameters[name]).abs().max() / parameters[name].abs().max()).item()
            for name, x in model.named_parameters()
        )
    dist.destroy_process_group()
    return seen if rank == 0 else None


def _summed(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()
