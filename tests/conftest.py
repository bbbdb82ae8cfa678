"""The part of the tests that runs by default, and how workers share it.

``-m exhaustive`` runs everything but the slow tests, ``-m slow`` the slow tests alone. By default

* a test of three parameters or more runs on combinations that contain every pair of their values;
* a test outside ``tests/features`` that takes a feature map runs on one map of each form;
* tests marked ``exhaustive`` are left out: long ones of what shorter ones ask too.

A test that takes ``device`` runs on the CPU and on the accelerator of this machine, if it has one;
``--device NAME`` chooses one of them.
"""

import gc
import itertools
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported: idle threads of one worker leave the cores to the other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Tests that share nothing made for a file: a function of theirs can go to either worker.
_APART = ("tests/attention/", "tests/features/", "tests/models/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out one file, or one function with all its parameters, at a time, the largest first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.split("[" if nodeid.startswith(_APART) else "::", 1)[0]

    return Scheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", metavar="NAME", help="device of the tests that take one")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        name = metafunc.config.getoption("device")
        metafunc.parametrize("device", _devices() if name is None else [name])


def _devices() -> list[str]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    expression = config.getoption("markexpr")
    if expression and expression != "exhaustive":
        return
    chosen = [item for item in items if not item.get_closest_marker("slow")]
    if not expression:
        chosen = [item for item in chosen if not item.get_closest_marker("exhaustive")]
        chosen = [item for item in chosen if _is_of_a_chosen_form(item)]
        functions = defaultdict(list)
        for item in chosen:
            functions[item.nodeid.split("[", 1)[0]].append(item)
        kept = {item for function in functions.values() for item in _all_pairs(function)}
        chosen = [item for item in chosen if item in kept]
    if len(chosen) < len(items):
        left = set(items).difference(chosen)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = chosen
    if expression == "exhaustive":
        for item in items:
            item.add_marker("exhaustive")


def pytest_collection_finish(session: pytest.Session) -> None:
    _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Keep what is alive, most of it made by imports, out of later garbage collections."""
    gc.collect()
    gc.freeze()


def _is_of_a_chosen_form(item: pytest.Item) -> bool:
    from tests.features.cases import FORMS, Case

    if not hasattr(item, "callspec") or "/features/" in item.nodeid:
        return True
    cases = [value for value in item.callspec.params.values() if isinstance(value, Case)]
    return all(case.name in FORMS for case in cases)


def _all_pairs(items: list[pytest.Item]) -> Iterable[pytest.Item]:
    """A small part of a function's combinations with every pair of parameter values in it."""
    axes = _axes(items[0])
    if len(axes) < 3:
        return items
    # Values are told apart by identity: those of a parameter are made once for all items.
    points = {
        item: [tuple(id(item.callspec.params[name]) for name in names) for names in axes]
        for item in items
    }
    pairs = {
        item: set(itertools.combinations(enumerate(point), 2)) for item, point in points.items()
    }
    order = sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode()))
    kept, covered = [], set()
    for least in range(len(axes) * (len(axes) - 1) // 2, 0, -1):
        for item in order:
            if len(pairs[item] - covered) >= least:
                kept.append(item)
                covered |= pairs[item]
    return kept


def _axes(item: pytest.Item) -> list[list[str]]:
    """The names of an item's parameters; those that are declared together form one axis."""
    if not hasattr(item, "callspec"):
        return []
    together = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        together.append([x.strip() for x in names.split(",")] if isinstance(names, str) else names)
    declared = set(itertools.chain(*together))
    return [*together, *([name] for name in item.callspec.params if name not in declared)]
