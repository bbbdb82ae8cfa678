"""Modules built on linear attention."""

from performers.nn.approximation import Approximation
from performers.nn.favor import FavorAttention
from performers.nn.multihead import PerformerAttention

__all__ = ["Approximation", "FavorAttention", "PerformerAttention"]
