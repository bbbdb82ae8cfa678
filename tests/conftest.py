"""Slow tests run only when they are asked for with ``-m``; workers share the cores."""

import os
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported: idle threads of one worker leave the cores to the other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Files whose tests share what takes minutes to make: one worker runs them all.
_TOGETHER = ("tests/study/test_study.py",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out one function with all its parameters at a time, the largest first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return file if file in _TOGETHER else nodeid.split("[", 1)[0]

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
