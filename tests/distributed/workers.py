"""One process of the group that the tests of this folder start: runs cases, writes what it saw."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def main(rank: int, world: int, folder: Path, *, every: bool) -> None:
    """Run the cases for a group of ``world`` processes, and write ``<world>-<rank>.json``."""
    torch.set_num_threads(1)
    store = f"file://{folder / f'store-{world}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    from tests.distributed import attention_cases

    if world == 2:
        from tests.distributed import model_cases, refusal_cases

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
    # Under load, gloo's threads can abort the interpreter's own exit.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), every="exhaustive" in sys.argv)
