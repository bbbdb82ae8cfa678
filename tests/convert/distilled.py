"""A program that distils a small model, in one process or those of torchrun, and saves it.

Arguments: kind of model, folder, and the arguments of ``distill`` as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from performers.convert import distill
from performers.training.callbacks import StopCallback
from tests.convert.test_distillation import examples, student_of, teacher_of


def _kill_after(last: int) -> None:
    """End the second process as the kernel would, after a step of the second stage."""
    step_end = StopCallback.on_step_end

    def killed(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == last and args.process_index == 1:
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    StopCallback.on_step_end = killed


def main(kind: str, folder: Path, options: dict) -> None:
    """Run, and write weights and history where the first process is."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if last := options.pop("killed", 0):
        _kill_after(last)
    teacher = teacher_of(kind)
    student = student_of(teacher, sinks=2 if kind == "llama" else 0)
    result = distill(student, teacher, examples(), output_dir=folder / "run", **options)
    weights = {name: x.detach().clone() for name, x in student.named_parameters()}
    rank = os.environ.get("RANK", "0")
    save_file(weights, folder / f"{rank}.safetensors")
    if rank == "0":
        (folder / "history.json").write_text(json.dumps(result.history))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
