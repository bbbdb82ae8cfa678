"""The protocol of model families: sites, observation, installation."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from performers.convert.conversion import Conversion
from performers.nn import FavorAttention

__all__ = ["Family", "Site", "call_model", "pre_hooks"]


@dataclass(frozen=True, eq=False)
class Site:
    """An attention layer that can become linear.

    Attributes:
        name: Name of its module in the model.
        module: The module.
        is_cross: Attention from a decoder to an encoder.
        head_dim: Width of queries and keys.
        key_heads: Heads of the keys.
    """

    name: str
    module: Any
    is_cross: bool
    head_dim: int
    key_heads: int

    def refusal(self) -> str | None:
        """Reason why the layer cannot become linear, and the remedy; None: it can."""
        return None

    def dropout(self) -> float:
        """The probability that a weight is dropped in training."""
        return 0.0

    def switch_dropout_off(self) -> None:
        """Set the dropout of the weights to 0."""


AnySite = TypeVar("AnySite", bound=Site)


class Family(ABC, Generic[AnySite]):
    """A way to convert models of one kind, for `performers.convert.to_performer.convert`.

    Args:
        model: The model, which stays as it is until `install`.
        conversion: The conversion.
        is_loading: Weights and fits are read from files afterwards.
    """

    takes_lists = False
    """Whether attention with listed keys can be installed."""

    def __init__(self, model: Any, conversion: Conversion, *, is_loading: bool = False) -> None:
        self.model, self.conversion, self.is_loading = model, conversion, is_loading

    @property
    def kind(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    @abstractmethod
    def sites(self) -> list[AnySite]:
        """The layers that ``layers`` counts, in order.

        Raises:
            ValueError: There are none, or the model is converted already.
        """

    def prepare(self, sites: Sequence[AnySite]) -> None:
        """Check the model before anything is built."""

    @abstractmethod
    def build(self, site: AnySite, generator: torch.Generator | None) -> FavorAttention:
        """The attention of one layer, on its device."""

    @abstractmethod
    def observe(
        self, favors: Mapping[AnySite, FavorAttention], add: Callable[..., None]
    ) -> AbstractContextManager[None]:
        """A context in which the exact model reports the attention calls of its layers.

        Args:
            favors: Built for the layers.
            add: Called with the site, the query ``(B, H, L, D)``, the key ``(B, Hkv, S, D)`` and
                options of `performers.convert.fitting.calibrate`.
        """

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch of calibration."""
        return call_model(self.model, *args, **kwargs)

    @abstractmethod
    def install(self, favors: Mapping[AnySite, FavorAttention]) -> None:
        """Put attention modules into the model."""


def call_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a transformers model for its attention alone.

    Without a cache, and without labels unless it makes its decoder's inputs of them.
    """
    inputs = dict(kwargs)
    if not getattr(model.config, "is_encoder_decoder", False):
        inputs.pop("labels", None)
    inputs.update(zip((model.main_input_name,), args, strict=False))
    if getattr(model.config.get_text_config(), "use_cache", None):
        inputs["use_cache"] = False
    return model(**inputs)


@contextlib.contextmanager
def pre_hooks(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Forward pre-hooks, called with keyword arguments too, while a context lasts."""
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
