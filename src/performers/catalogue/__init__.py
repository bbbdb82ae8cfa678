"""Softmax over very many items: sampling, its loss, and pointing."""

from performers.catalogue.loss import sampled_softmax_loss
from performers.catalogue.pointer import PerformerPointer
from performers.catalogue.sampler import CatalogueSampler

__all__ = ["CatalogueSampler", "PerformerPointer", "sampled_softmax_loss"]
