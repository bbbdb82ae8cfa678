"""The structures that Python fills are those that the library reads."""

import ctypes

from performers.attention.native import library
from performers.attention.native.interface import Call
from tests.attention.native.support import NATIVE


@NATIVE
def test_both_sides_agree_on_the_size_of_a_call():
    size = library.load().performers_call_size
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(Call)
