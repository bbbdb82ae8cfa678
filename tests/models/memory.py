"""How much memory tensors hold."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldBytes(TorchDispatchMode):
    """Bytes of the storages that operators made inside this mode and that still live.

    Attributes:
        now: At the moment.
        peak: At most so far.
        largest: Elements of the largest tensor made, by its last dimension.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.largest = {}
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self._key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                width = x.shape[-1] if x.ndim else 1
                self.largest[width] = max(self.largest.get(width, 0), x.numel())
                key = self._key(x)
                if key not in self._known and key not in given:
                    self._hold(x.untyped_storage(), key)
        return out

    @staticmethod
    def _key(x):
        return x.untyped_storage()._cdata

    def _hold(self, storage, key):
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key, size):
        self._known.discard(key)
        self.now -= size
