"""Slow tests run only when they are asked for with ``-m``; workers share the cores."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported: idle threads of one worker leave the cores to the other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
