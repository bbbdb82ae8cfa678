"""The structures that Python fills are those that the library reads."""

import ctypes

import pytest

from performers.attention.native import library
from performers.attention.native.interface import Call, ListedCall
from tests.attention.native.support import NATIVE


@NATIVE
@pytest.mark.parametrize(("name", "call"), [("call", Call), ("listed_call", ListedCall)])
def test_both_sides_agree_on_the_size_of_a_call(name, call):
    size = getattr(library.load(), f"performers_{name}_size")
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(call)
