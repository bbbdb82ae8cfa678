"""Groups of processes, started once for this folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]
# On a machine that others use, too.
_SECONDS = 600


@pytest.fixture(scope="session")
def results_of(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[Any]]:
    """Results that the processes of a group wrote, by rank."""
    folder = tmp_path_factory.mktemp("distributed")
    found: dict[int, list[Any]] = {}
    program, part = "tests.distributed.workers", pytestconfig.getoption("markexpr")

    def run(world: int) -> list[Any]:
        if world not in found:
            paths = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
            workers = [
                subprocess.Popen(
                    [sys.executable, "-m", program, str(rank), str(world), str(folder), part],
                    env={**os.environ, "PYTHONPATH": paths},
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(world)
            ]
            try:
                errors = [worker.communicate(timeout=_SECONDS)[1] for worker in workers]
            finally:
                for worker in workers:
                    worker.kill()
            assert [worker.returncode for worker in workers] == [0] * world, "\n".join(errors)
            found[world] = [
                json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)
            ]
        return found[world]

    return run
