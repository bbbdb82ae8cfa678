"""The process that peak memory is measured in: reads a task on standard input, prints the peak."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from performers.benchmark.calls import AttentionCall
from performers.benchmark.contestants import contestants
from performers.benchmark.memory import Peak, limited_memory, peak_of
from performers.benchmark.workload import Workload

# Loads libraries and starts threads, which are not the call's own memory.
_WARM_UP_LENGTH = 64


def main() -> None:
    """Do the task on standard input, a JSON object.

    ``{"kind": "attention", "workload": {...}, "contestant": ..., "length": ..., "is_causal": ...,
    "backward": ..., "threads": ...}`` measures one call of an attention. ``{"kind": "step",
    "model": {...}, "attention": ..., "length": ..., "threads": ...}`` measures a model, its
    optimiser and two training steps. ``{"kind": "forward", "folder": ..., "converted": ...,
    "length": ..., "batch_size": ..., "seed": ..., "threads": ...}`` measures the forward pass of a
    pretrained model, or of a converted one.
    """
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    with limited_memory():
        peak = _KINDS[task["kind"]](task)
    print(json.dumps(peak._asdict()))


def _attention(task: Mapping[str, Any]) -> Peak:
    workload = Workload(**task["workload"])
    attend = contestants()[task["contestant"]].build(workload, task["is_causal"])

    def call(length: int) -> AttentionCall:
        inputs = workload.inputs(length, requires_grad=task["backward"])
        return AttentionCall(attend, inputs, backward=task["backward"])

    call(_WARM_UP_LENGTH)()
    return peak_of(call(task["length"]))


def _step(task: Mapping[str, Any]) -> Peak:
    from performers.benchmark.steps import Shape, TrainingStep

    shape = Shape(**task["model"])
    TrainingStep(shape, task["attention"], _WARM_UP_LENGTH)()

    def two_steps() -> TrainingStep:
        step = TrainingStep(shape, task["attention"], task["length"])
        # The first makes the optimiser's state, the second has all of it to hold at once.
        step()
        step()
        return step

    return peak_of(two_steps)


def _forward(task: Mapping[str, Any]) -> Peak:
    from performers.benchmark.converted import probe_forward

    return peak_of(probe_forward(task, _WARM_UP_LENGTH))


_KINDS: dict[str, Callable[[Mapping[str, Any]], Peak]] = {
    "attention": _attention,
    "step": _step,
    "forward": _forward,
}

if __name__ == "__main__":
    main()
