"""Protocol of model families: sites, observation, installation."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from performers.convert.options import Conversion
from performers.nn import FavorAttention


@dataclass(frozen=True, eq=False)
class Site:
    """An attention layer that can become linear: a module, its name in the model and its sizes.

    ``is_cross`` marks attention from a decoder to an encoder.
    """

    name: str
    module: Any
    is_cross: bool
    head_dim: int
    key_heads: int

    def refusal(self) -> str | None:
        """Reason why the layer cannot become linear, and the remedy; None: it can."""
        return None

    def remove_dropout(self) -> float:
        """Set the dropout of the attention weights to 0; returns its probability before."""
        return 0.0


class Family(ABC):
    """Conversion steps that depend on the kind of model, which is unchanged until `install`.

    With ``is_loading``, weights and fits are read from files afterwards.
    """

    takes_lists = False
    """True if attention with listed keys can be installed."""

    def __init__(self, model: Any, conversion: Conversion, *, is_loading: bool = False) -> None:
        self.model, self.conversion, self.is_loading = model, conversion, is_loading

    @property
    def kind(self) -> str:
        """Class of the model, for messages."""
        return type(self.model).__name__

    @abstractmethod
    def sites(self) -> Sequence[Site]:
        """List the layers that can become linear, at least one, in the order of the model."""

    def prepare(self, sites: Sequence[Site]) -> Collection[Site]:
        """Check the model before anything is built; returns the sites that it is sure to call."""
        return ()

    def build(self, site: Site, generator: torch.Generator | None) -> FavorAttention:
        """Build the attention of one layer; families bring it to the layer's device."""
        return self.conversion.attention(
            site.head_dim, site.key_heads, is_cross=site.is_cross, generator=generator
        )

    @abstractmethod
    def observe(
        self, favors: Mapping[Site, FavorAttention], add: Callable[..., None]
    ) -> AbstractContextManager[None]:
        """Return a context in which the exact model reports the attention calls of its layers.

        ``add`` is called with the site, the query ``(B, H, L, D)``, the key ``(B, Hkv, S, D)`` and
        ``is_causal``, ``key_mask``, ``cu_seqlens`` and ``scale`` of `FavorAttention`.
        """

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch of calibration."""
        return call_model(self.model, *args, **kwargs)

    @abstractmethod
    def install(self, favors: Mapping[Site, FavorAttention]) -> None:
        """Put attention modules into the model."""


def call_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a transformers model without a cache.

    It gets no labels unless it makes the inputs of its decoder from them. A single positional
    argument is the main input.
    """
    inputs = {**kwargs, **without_cache(model)}
    if not getattr(model.config, "is_encoder_decoder", False):
        inputs.pop("labels", None)
    if len(args) == 1:
        inputs[model.main_input_name] = args[0]
        args = ()
    return model(*args, **inputs)


def without_cache(model: Any) -> dict[str, bool]:
    """Argument of a model that has a cache, to keep none."""
    uses = getattr(model.config.get_text_config(), "use_cache", None)
    return {"use_cache": False} if uses else {}


@contextlib.contextmanager
def pre_hooks(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Register forward pre-hooks, called with keyword arguments too, while a context lasts."""
    with contextlib.ExitStack() as stack:
        for module, hook in hooks.items():
            stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
