"""The examples in the docstrings of the core run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import performers

CORE = ("features", "attention", "planning", "nn")


def modules():
    yield "performers"
    for package in CORE:
        name = f"performers.{package}"
        yield name
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
            # The compiled library carries the suffix of an extension module, and is none.
            if not module.name.endswith(".libperformers_native"):
                yield module.name


@pytest.mark.parametrize("name", list(modules()))
def test_examples(name):
    if ".triton." in name:
        pytest.importorskip("triton")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize(
    "name", ["favor_attention", "SoftmaxFeatures", "PerformerAttention", "use_backend"]
)
def test_the_main_names_show_an_example(name):
    found = doctest.DocTestFinder(recurse=False).find(getattr(performers, name), name)
    assert any(test.examples for test in found)
