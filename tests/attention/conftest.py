"""Combinations that the package refuses, or a backend does not cover, are left out.

``test_arguments.py`` and ``test_backends.py`` test the refusals.
"""

from itertools import product

import pytest
import torch

from tests.attention.cases import BACKENDS, POSITIVE, Configuration, refusal
from tests.features.cases import CASES, Case


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if not _is_covered(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if _is_covered(item)]


def _is_covered(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    names = {case.name: case for case in CASES}

    def values(kind: type) -> list:
        return [x for x in params.values() if isinstance(x, kind)]

    backends = [x for x in values(str) if x in BACKENDS]
    maps = [*values(Case), *(names[x] for x in values(str) if x in names)] or [POSITIVE]
    modes = [params.get("mode", "bidirectional")]
    dtypes, devices = values(torch.dtype) or [torch.float32], [params.get("device", "cpu")]
    takes = (x.takes(case, mode) for x, case, mode in product(values(Configuration), maps, modes))
    covers = (refusal(*option) is None for option in product(backends, maps, dtypes, devices))
    return all(takes) and all(covers)
