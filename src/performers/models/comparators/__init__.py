"""Other people's efficient attentions, to compare with: one mechanism a file.

Each takes any queries, keys and values, masks and packed rows, and forms no L×L matrix unless one
is asked for. They are written here because the implementations in transformers own their
projections and pad to whole blocks, and none handles packed rows: Reformer's chunks and BigBird's
random blocks depend on later tokens or on the training mode, Longformer's window has no causal
form.
"""

from performers.models.comparators.bigbird import BigBirdMechanism
from performers.models.comparators.hashing import HashFeatures
from performers.models.comparators.linformer import LinformerMechanism
from performers.models.comparators.local import LocalMechanism
from performers.models.comparators.lsh import LshMechanism

__all__ = [
    "BigBirdMechanism",
    "HashFeatures",
    "LinformerMechanism",
    "LocalMechanism",
    "LshMechanism",
]
