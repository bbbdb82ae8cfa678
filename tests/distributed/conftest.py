"""Groups of processes, started once for this folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[2]
# On a machine that others use, too.
_SECONDS = 600


@pytest.fixture(scope="session")
def results(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[Any]]:
    """Results that the processes of each group wrote, by the size of the group and by rank."""
    folder = tmp_path_factory.mktemp("distributed")
    program, part = "tests.distributed.workers", pytestconfig.getoption("markexpr")
    paths = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-m", program, str(folder), part],
        env={**os.environ, "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        errors = process.communicate(timeout=_SECONDS)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors
    found: dict[int, list[Any]] = {}
    for path in sorted(folder.glob("*.json")):
        found.setdefault(int(path.stem[0]), []).append(json.loads(path.read_text()))
    return found
