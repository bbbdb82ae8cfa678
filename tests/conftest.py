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
import signal
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow for seconds at a time.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported: workers and the processes that they start share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it for what it starts in the background; tests press Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_MARKS = {"slow", "exhaustive"}

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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None]:
    if "device" in metafunc.fixturenames:
        name = metafunc.config.getoption("device")
        metafunc.parametrize("device", _devices() if name is None else [name])
    yield
    # Combinations are left out here, since tens of thousands of tests take longer to make than
    # those that run by default. What is slow or exhaustive is left out afterwards.
    if not metafunc.config.getoption("markexpr"):
        unmarked = [call for call in metafunc._calls if not _MARKS & {x.name for x in call.marks}]
        chosen = [call for call in unmarked if _is_of_a_chosen_form(metafunc, call)]
        metafunc._calls = _all_pairs(metafunc, chosen) or metafunc._calls[:1]


def _devices() -> list[str]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    expression = config.getoption("markexpr")
    if expression and expression != "exhaustive":
        return
    refused = ["slow"] if expression else _MARKS
    chosen = [item for item in items if not any(map(item.get_closest_marker, refused))]
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


def _is_of_a_chosen_form(metafunc: pytest.Metafunc, call: Any) -> bool:
    from tests.features.cases import FORMS, Case

    if "/features/" in metafunc.definition.nodeid:
        return True
    cases = [value for value in call.params.values() if isinstance(value, Case)]
    return all(case.name in FORMS for case in cases)


def _all_pairs(metafunc: pytest.Metafunc, calls: list[Any]) -> list[Any]:
    """A small part of a function's combinations with every pair of parameter values in it."""
    axes = _axes(metafunc, calls[0]) if calls else []
    if len(axes) < 3:
        return calls
    # Values are told apart by identity: those of a parameter are made once for all combinations.
    points = [[tuple(id(call.params[name]) for name in names) for names in axes] for call in calls]
    pairs = [set(itertools.combinations(enumerate(point), 2)) for point in points]
    name = metafunc.definition.nodeid
    order = [zlib.crc32(f"{name}[{call.id}]".encode()) for call in calls]
    kept, covered = [], set()
    for least in range(len(axes) * (len(axes) - 1) // 2, 0, -1):
        for index in sorted(range(len(calls)), key=order.__getitem__):
            if len(pairs[index] - covered) >= least:
                kept.append(index)
                covered |= pairs[index]
    return [calls[index] for index in sorted(kept)]


def _axes(metafunc: pytest.Metafunc, call: Any) -> list[list[str]]:
    """The names of a function's parameters; those that are declared together form one axis."""
    together = []
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        together.append([x.strip() for x in names.split(",")] if isinstance(names, str) else names)
    declared = set(itertools.chain(*together))
    return [*together, *([name] for name in call.params if name not in declared)]
