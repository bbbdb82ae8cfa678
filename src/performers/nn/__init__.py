"""Modules built on linear attention."""

from performers.nn.attention import PerformerAttention

__all__ = ["PerformerAttention"]
