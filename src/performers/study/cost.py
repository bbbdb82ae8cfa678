"""Time and memory of a model's step or forward pass, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from performers.benchmark.memory import is_out_of_memory, limited_memory, peak_of
from performers.benchmark.timing import summarize
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.proteins.inputs.tokenizer import build_protein_tokenizer
from performers.proteins.options import TrainingOptions

_WARM_UP_LENGTH = 64
_KILLED = -9


@dataclass(frozen=True)
class Cost:
    """What one call takes.

    Attributes:
        seconds: Median; None when it failed.
        peak_bytes: Memory above what the process held before, model included; None when it failed.
        failure: Why there are no numbers; empty otherwise.
    """

    seconds: float | None
    peak_bytes: int | None
    failure: str = ""


def measure_cost(
    options: TrainingOptions,
    row: npt.NDArray[np.integer],
    *,
    backward: bool,
    repeats: int = 3,
    threads: int | None = None,
    timeout: float = 1800.0,
) -> Cost:
    """Time a training step, or a forward pass, on one row of tokens.

    Args:
        options: The model; see ``TrainingOptions``.
        row: Token ids, of shape (length,).
        backward: A step with the optimiser; otherwise a forward pass without gradients.
        repeats: Calls timed after a first one.
        threads: Threads of torch; those of this process when None.
        timeout: Seconds to wait.

    Returns:
        The cost, or why there is none: out of memory, or too slow.
    """
    task = {
        "options": options.to_dict(),
        "row": row.tolist(),
        "backward": backward,
        "repeats": repeats,
        "threads": threads or torch.get_num_threads(),
    }
    # A launcher's variables would make the process wait for others.
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "performers.study.cost"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            env={**environment, "OMP_NUM_THREADS": str(task["threads"])},
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Cost(None, None, f"no result after {timeout:.0f} s")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == _KILLED:
        # Linux ends so what takes too much memory, and so may anybody.
        return Cost(None, None, "killed (out of memory?)")
    if is_out_of_memory(last):
        return Cost(None, None, "out of memory")
    if done.returncode:
        return Cost(None, None, f"exit code {done.returncode}: {last}")
    return Cost(**json.loads(done.stdout.strip().splitlines()[-1]))


_LAUNCHER = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})


def _call(options: TrainingOptions, row: torch.Tensor, backward: bool) -> Callable[[], object]:
    tokenizer = build_protein_tokenizer()
    torch.manual_seed(options.seed)
    model_class = PerformerForCausalLM if options.objective == "clm" else PerformerForMaskedLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_class(options.model_config(tokenizer)).to(device)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = row[None].to(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=options.bf16)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    extra = {"use_cache": False} if options.objective == "clm" else {}
    if not backward:
        model.eval()

        def forward() -> None:
            with torch.inference_mode(), autocast:
                model(rows, **extra)
            wait()

        return forward
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=options.learning_rate)

    def step() -> None:
        with autocast:
            loss = model(rows, labels=rows, **extra).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()

    return step


def _measure(task: Mapping[str, Any]) -> Cost:
    options = TrainingOptions(**task["options"])
    row = torch.tensor(task["row"])
    # Loads libraries and starts threads, which are not the call's own.
    _call(options, row[:_WARM_UP_LENGTH], task["backward"])()
    seconds: list[float] = []

    def calls() -> Callable[[], object]:
        call = _call(options, row, task["backward"])
        # The first makes the optimiser's state.
        call()
        for _ in range(task["repeats"]):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return call

    with limited_memory():
        peak = peak_of(calls)
    if torch.cuda.is_available():
        peak = peak._replace(nbytes=torch.cuda.max_memory_allocated())
    return Cost(summarize(seconds).median, peak.nbytes)


if __name__ == "__main__":
    given = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    print(json.dumps(vars(_measure(given))))
