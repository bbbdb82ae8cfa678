"""The structures of ``csrc/performers_native.h``, filled from tensors."""

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from performers.attention.native import library

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OUT_OF_MEMORY, _NOT_FINITE = 1, 4
KINDS = {"exponential": 0, "rectified": 1}
PARTS = {"whole": 0, "joined": 0, "feature": 1, "exact": 2}


class _Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 5),
        ("type", ctypes.c_int64),
    )


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Call(ctypes.Structure):
    """``performers_call``: one attention call, its results and its gradients."""

    _fields_ = (
        *_fields(ctypes.c_int64, "batch key_heads groups length size head_dim value_dim features"),
        *_fields(ctypes.c_int64, "weight_heads kind quadratic causal threads offset window sinks"),
        ("part", ctypes.c_int64),
        *_fields(ctypes.c_double, "scale epsilon normalizer"),
        *_fields(_Array, "query key value"),
        *_fields(ctypes.c_void_p, "weight bias key_mask segments positions"),
        *_fields(_Array, "sink_key sink_value"),
        *_fields(ctypes.c_void_p, "sink_first past_key_value past_key_sum past_log_scale"),
        *_fields(_Array, "out"),
        *_fields(ctypes.c_void_p, "row_scale row_inverse key_value key_sum log_scale"),
        *_fields(_Array, "grad_out"),
        *_fields(ctypes.c_void_p, "grad_log_normaliser grad_key_value grad_key_sum"),
        *_fields(_Array, "grad_query grad_key grad_value"),
        *_fields(ctypes.c_void_p, "grad_past_key_value grad_past_key_sum"),
        *_fields(ctypes.c_void_p, "grad_sink_key grad_sink_value grad_weight grad_bias"),
    )

    @classmethod
    def sized(
        cls, *, heads: int, length: int, head_dim: int, value_dim: int, features: int
    ) -> "Call":
        """A call with sizes only, as ``performers_products`` reads it: one batch, no groups."""
        call = cls()
        call.batch, call.key_heads, call.groups, call.weight_heads = 1, heads, 1, 1
        call.length = call.size = length
        call.head_dim, call.value_dim, call.features = head_dim, value_dim, features
        call.threads, call.window = torch.get_num_threads(), -1
        return call

    def arrays(self, **tensors: Tensor) -> None:
        """Set strided arrays; one of four dimensions has no groups."""
        for name, tensor in tensors.items():
            array = getattr(self, name)
            array.data, array.type = tensor.data_ptr(), _TYPES[tensor.dtype]
            strides = tensor.stride()
            array.strides[:] = strides if len(strides) == 5 else (*strides[:2], 0, *strides[2:])

    def pointers(self, names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
        """Set contiguous tensors; None and an empty tensor are null pointers."""
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is not None:
                setattr(self, name, tensor.data_ptr())

    def reads(self, names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
        """Set tensors of any strides, of which copies that are needed live as long as the call."""
        whole = [None if tensor is None else tensor.contiguous() for tensor in tensors]
        self.pointers(names, whole)
        self.copies = [*getattr(self, "copies", ()), *whole]

    def run(self, function: str) -> bool:
        """Call ``performers_<function>``, outside the interpreter's lock.

        Returns:
            Whether the results mean something: not after a forward pass that met NaN or infinity.

        Raises:
            MemoryError: Memory ran out.
            RuntimeError: Anything else went wrong.
        """
        code = getattr(library.load(), f"performers_{function}")(ctypes.byref(self))
        if code == _OUT_OF_MEMORY:
            raise MemoryError(
                "the native kernels ran out of memory; use a shorter sequence or a smaller batch"
            )
        if code not in (0, _NOT_FINITE):
            raise RuntimeError(f"performers_{function} failed with code {code}")
        return bool(code == 0)


class ListedCall(Call):
    """``performers_listed_call``: queries in blocks, and the list of keys that each block meets."""

    _fields_ = (
        *_fields(ctypes.c_int64, "blocks rows lists"),
        *_fields(ctypes.c_void_p, "row position list_begin hidden"),
        *_fields(ctypes.c_void_p, "estimate exact estimate_log exact_log"),
        *_fields(ctypes.c_void_p, "grad_estimate grad_estimate_log grad_exact grad_exact_log"),
    )
