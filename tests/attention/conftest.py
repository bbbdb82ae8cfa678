"""Combinations that the package refuses, or a backend does not cover, are left out.

``test_arguments.py`` and ``test_backends.py`` test the refusals.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from performers.attention.torch_backend import blocks, exact, listed
from tests.attention.cases import BACKENDS, POSITIVE, Configuration, refusal
from tests.features.cases import CASES, Case

_CASES = {case.name: case for case in CASES}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the torch backend as small as they get, so that short calls have many."""
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", {})
    monkeypatch.setattr(blocks, "_ACCELERATOR_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(exact, "BLOCK_PAIRS", 1 << 14)
    monkeypatch.setattr(listed, "_BLOCK_ELEMENTS", 1 << 14)


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None]:
    yield
    covered = [call for call in metafunc._calls if _is_covered(call.params)]
    metafunc._calls = covered or metafunc._calls[:1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Functions without any combination that is covered.
    left = [x for x in items if hasattr(x, "callspec") and not _is_covered(x.callspec.params)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def _is_covered(params: dict[str, Any]) -> bool:
    backends = [x for x in params.values() if isinstance(x, str) and x in BACKENDS]
    configurations = [x for x in params.values() if isinstance(x, Configuration)]
    if not (backends or configurations):
        return True
    named = (_CASES.get(x, x) if isinstance(x, str) else x for x in params.values())
    maps = [x for x in named if isinstance(x, Case)] or [POSITIVE]
    dtypes = [x for x in params.values() if isinstance(x, torch.dtype)] or [torch.float32]
    mode, device = params.get("mode", "bidirectional"), params.get("device", "cpu")
    takes = (x.takes(case, mode) for x, case in product(configurations, maps))
    covers = (refusal(*option, device) is None for option in product(backends, maps, dtypes))
    return all(takes) and all(covers)
