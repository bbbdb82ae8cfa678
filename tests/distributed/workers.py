"""Groups of processes that the tests of this folder start: run cases, write what they saw.

The processes are forks of one that has imported everything.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import attention_cases, model_cases, refusal_cases


def work(rank: int, world: int, folder: Path, *, every: bool) -> None:
    """Run the cases for a group of ``world`` processes, and write ``<world>-<rank>.json``."""
    torch.set_num_threads(1)
    store = f"file://{folder / f'store-{world}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    if world == 2:
        results = {
            "attention": attention_cases.all_errors(rank, world, every=every),
            "models": model_cases.all_errors(folder, every=every),
            "unlike models": model_cases.unlike_models(rank),
            "refusals": refusal_cases.refusals(rank),
        }
    else:
        results = {"attention": attention_cases.errors_between(rank, world)}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
    dist.barrier()


def main(folder: Path, *, every: bool) -> int:
    """Run one group after the other; the number of processes that failed."""
    failed = 0
    for world in (2, 3, 4) if every else (2, 3):
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                code = 1
                try:
                    work(rank, world, folder, every=every)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    # Under load, gloo's threads can abort the interpreter's own exit.
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), every="exhaustive" in sys.argv))
