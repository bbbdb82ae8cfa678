"""A backend is tested with what it covers; ``test_backends.py`` has the rest."""

from itertools import product

import pytest
import torch

from tests.attention.cases import BACKENDS, covers
from tests.features.cases import CASES, Case, by_name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if not _is_covered(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if _is_covered(item)]


def _is_covered(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    backends = [x for x in params.values() if isinstance(x, str) and x in BACKENDS]
    maps = [x for x in params.values() if isinstance(x, Case)]
    if params.get("name") in {case.name for case in CASES}:
        maps.append(by_name(params["name"]))
    dtypes = [x for x in params.values() if isinstance(x, torch.dtype)]
    options = product(backends, maps or [by_name("positive")], dtypes or [torch.float32])
    return all(covers(*option) for option in options)
