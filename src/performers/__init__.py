"""Attention in linear time: random features, Performer modules and models.

Names are imported on first use, so that the command line starts before torch does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from performers.attention import (
        FavorState,
        KeyBuckets,
        ListedKeys,
        backends,
        favor_attention,
        favor_attention_weights,
        favor_state,
        merge_states,
        scaled_dot_product_attention,
        use_backend,
    )
    from performers.features import (
        GeneralizedFeatures,
        LearnedFeatures,
        SoftmaxFeatures,
        redraw_features_,
    )
    from performers.nn import PerformerAttention
    from performers.planning import plan

    __version__: str

__all__ = [
    "FavorState",
    "GeneralizedFeatures",
    "KeyBuckets",
    "LearnedFeatures",
    "ListedKeys",
    "PerformerAttention",
    "SoftmaxFeatures",
    "backends",
    "favor_attention",
    "favor_attention_weights",
    "favor_state",
    "merge_states",
    "plan",
    "redraw_features_",
    "scaled_dot_product_attention",
    "use_backend",
]

_PACKAGES = ("attention", "features", "nn", "planning", "catalogue", "distributed")


def __getattr__(name: str) -> Any:
    """Import a public name, or the package of that name; look up the version."""
    if name == "__version__":
        # Takes three times as long as all else here.
        from importlib.metadata import PackageNotFoundError, version

        try:
            globals()[name] = version("performers")
        except PackageNotFoundError:
            # Sources on the path, not installed.
            globals()[name] = "0+unknown"
        return globals()[name]
    if name in _PACKAGES:
        return importlib.import_module(f"performers.{name}")
    if name in __all__:
        for package in _PACKAGES:
            module = importlib.import_module(f"performers.{package}")
            if name in module.__all__:
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES, "__version__"})
