"""The attention implementation ``"favor"`` of transformers.

transformers models ask for their attention and their masks by name. Importing this module
registers ``"favor"`` for both. A module with a `FavorAttention` from `to_performer` is computed by
it; a module that stays exact is computed by torch, in linear time where the model has a sliding
window. Requests that linear attention cannot fulfil raise an error.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from performers.convert.interface.cache import RUNNING
from performers.convert.interface.call import (
    AttentionCall,
    exact_attention,
    exact_weights,
    linear_attention,
    linear_weights,
    weights_wanted,
)
from performers.convert.interface.masks import AttentionPattern, pattern_mask
from performers.convert.options import FAVOR
from performers.convert.record import IMPLEMENTATION, SAVED_IMPLEMENTATION

_INTERCEPTED: WeakKeyDictionary[nn.Module, Callable[[AttentionCall], Tensor]] = WeakKeyDictionary()


def favor_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionPattern | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a module; registered with transformers' ``AttentionInterface``.

    ``attention_mask`` is the result of `pattern_mask`, or a tensor from the user. Returns
    ``(B, L, H, Dv)``, and the matrix of weights ``(B, H, L, S)`` if ``output_attentions`` is set,
    else None; in exact layers too.
    """
    if isinstance(attention_mask, AttentionPattern):
        # The layers of a model may be spread over devices.
        pattern = attention_mask.on(query.device)
    elif attention_mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        pattern = AttentionPattern(is_causal=bool(causal))
    else:
        shape = tuple(attention_mask.shape)
        pattern = AttentionPattern(
            unknown=f"a mask of shape {shape} instead of one of shape (batch, length)",
            make_dense=lambda: attention_mask,
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache_layer = RUNNING.layers.pop(id(module), None)
    call = AttentionCall(module, query, key, value, scale, pattern, dropout, cache_layer, options)
    weights = None
    if module in _INTERCEPTED:
        if call.cache_layer is not None:
            raise ValueError(
                "a converted model cannot use a cache while its attention is calibrated or "
                "trained: pass use_cache=False"
            )
        out = _INTERCEPTED[module](call)
    else:
        if not hasattr(module, FAVOR):
            raise ValueError(
                f"{call.name} has no random features: attn_implementation='favor' is set by "
                "performers.convert.to_performer(model), which adds them; call that on a model "
                "loaded as usual, or performers.convert.load_performer on a saved one"
            )
        block: Any = getattr(module, FAVOR)
        out = exact_attention(call) if block is None else linear_attention(block, call)
        if weights_wanted(options):
            weights = exact_weights(call) if block is None else linear_weights(block, call)
    return out.to(query.dtype).transpose(1, 2).contiguous(), weights


@contextlib.contextmanager
def intercept_attention(
    modules: Mapping[nn.Module, Callable[[AttentionCall], Tensor]], model: Any
) -> Iterator[None]:
    """Compute some attention modules by functions while a context lasts.

    The model, converted or not, runs with the ``"favor"`` implementation meanwhile; its other
    modules compute their attention as before.
    """
    functions: dict[nn.Module, Callable[[AttentionCall], Tensor]] = {
        module: exact_attention
        for _, module in interface_modules(model)
        if not hasattr(module, FAVOR)
    }
    functions.update(modules)
    outer = {module: _INTERCEPTED[module] for module in functions if module in _INTERCEPTED}
    before = set_implementation(model)
    try:
        _INTERCEPTED.update(functions)
        yield
    finally:
        for module in functions:
            _INTERCEPTED.pop(module, None)
        _INTERCEPTED.update(outer)
        _restore(before)


def set_implementation(model: Any) -> list[tuple[Any, Any]]:
    """Set the implementation of a model and its parts to ``"favor"``.

    Returns their configurations, with the implementations before.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(part.config): part.config for part in parts}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        left = {type(x).__name__ for x in parts if x.config._attn_implementation != IMPLEMENTATION}
        if left:
            raise ValueError(
                f"{', '.join(sorted(left))} does not go through the attention interface of "
                "transformers: its attention cannot be made linear"
            )
    except Exception:
        _restore(before)
        raise
    return before


def _restore(implementations: list[tuple[Any, Any]]) -> None:
    # In the order of the modules: a configuration passes its value down to those within it.
    for config, implementation in implementations:
        config._attn_implementation = implementation


def interface_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose forward pass calls transformers' attention interface, with their names."""
    for name, module in model.named_modules():
        code = forward_code(module)
        if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            yield name, module


def forward_code(module: nn.Module) -> CodeType | None:
    """Code of a module's forward pass, or None."""
    return getattr(inspect.unwrap(type(module).forward), "__code__", None)


def _unconverted_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Refuse to run; registered under the name in saved configurations."""
    raise ValueError(
        f"{type(module).__name__} comes from the folder of a converted model, but its features "
        "were not loaded: open the folder with performers.convert.load_performer"
    )


AttentionInterface.register(IMPLEMENTATION, favor_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, pattern_mask)
AttentionInterface.register(SAVED_IMPLEMENTATION, _unconverted_forward)
AttentionMaskInterface.register(SAVED_IMPLEMENTATION, pattern_mask)
