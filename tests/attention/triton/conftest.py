"""The kernels run in Triton's interpreter, which a whole process has or has not.

``TRITON_INTERPRET=1 python -m pytest tests/attention/triton`` runs them; without the variable only
the tests that compile them are collected.
"""

import importlib.util
import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETED:
    collect_ignore = ["test_compiles.py"]
else:
    collect_ignore_glob = ["test_[!c]*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Exponentials of pairs that are masked afterwards overflow, of which NumPy warns.
    for item in items:
        if "/triton/" in item.nodeid:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(autouse=True)
def short_splits(monkeypatch):
    """Cut sequences of a test's length into several splits."""
    from performers.attention.triton import launcher

    monkeypatch.setattr(launcher, "LEAST_SPAN", 64)
