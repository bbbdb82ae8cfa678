"""The attention implementation ``"favor"`` of transformers.

transformers models ask for their attention and their masks by name. Importing this module
registers ``"favor"`` for both. A module that `to_performer` has given a `FavorBlock` is computed by
it; a module that was left exact is computed by torch, in linear time where the model itself has a
sliding window. Nothing that the model asks for is ignored: what linear attention cannot do is
refused with a sentence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.output_capturing import _active_collector

from performers.convert.block import BLOCK, FavorBlock
from performers.convert.cache import ConvertedCacheLayer, take_cache_layer
from performers.convert.modules import interface_modules
from performers.convert.patterns import AttentionPattern, pattern_mask
from performers.convert.sliding import sliding_attention

__all__ = ["IMPLEMENTATION", "AttentionCall", "exact_attention", "intercept_attention"]

IMPLEMENTATION = "favor"
# Arguments of the attention interface that make attention something else than masked softmax.
_OTHER_ATTENTION = {
    "softcap": "soft-capping of the scores",
    "s_aux": "learned sink logits in the softmax",
    "sinks": "learned sink logits in the softmax",
    "position_bias": "a position bias on the scores",
    "indices": "keys chosen by an indexer",
    "block_indices": "blocks of keys chosen by an indexer",
    "cache": "a paged cache (continuous batching)",
}
# Those of them that torch's attention, which computes exact layers, would pass over in silence.
_UNKNOWN_TO_TORCH = ("s_aux", "sinks", "indices", "block_indices")


@dataclass
class AttentionCall:
    """One call of a model's attention, after projections and rotary positions.

    Attributes:
        module: The attention module.
        query: (B, H, L, D).
        key: (B, Hkv, S, D); Hkv divides H.
        value: (B, Hkv, S, Dv).
        scale: Factor of the scores.
        pattern: Who sees whom.
        dropout: Probability that a weight is dropped.
        cache_layer: The past of a linear layer, or None.
        options: What else the model passed.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    pattern: AttentionPattern
    dropout: float
    cache_layer: ConvertedCacheLayer | None
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The module's class, for messages."""
        return type(self.module).__name__


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
    """The function registered with transformers' ``AttentionInterface``.

    Args:
        module: The attention module.
        query: (B, H, L, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attention_mask: What `pattern_mask` made; a tensor is a mask that the user passed.
        dropout: Probability that a weight is dropped.
        scaling: Factor of the scores; None: ``D ** -0.5``.
        is_causal: Where there is no mask: whether attention is causal; None: as the module says.
        **options: What else the model passes.

    Returns:
        (B, L, H, Dv), and the matrix of weights (B, H, L, S) when ``output_attentions`` asks for
        it, else None; the exact layers of a converted model give theirs too.

    Raises:
        ValueError: The model was not converted, or the call asks for what a linear layer cannot do.
    """
    call = AttentionCall(
        module,
        query,
        key,
        value,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        _pattern(module, attention_mask, is_causal, query.device),
        dropout,
        take_cache_layer(module),
        options,
    )
    weights = None
    if module in _INTERCEPTED:
        if call.cache_layer is not None:
            raise ValueError(
                "a converted model cannot use a cache while its attention is calibrated or "
                "trained: pass use_cache=False"
            )
        out = _INTERCEPTED[module](call)
    else:
        block = _block(call)
        out = exact_attention(call) if block is None else linear_attention(block, call)
        if _weights_wanted(options):
            weights = _exact_weights(call) if block is None else _weights(block, call)
    return out.to(query.dtype).transpose(1, 2).contiguous(), weights


def exact_attention(call: AttentionCall) -> Tensor:
    """Softmax attention as torch computes it, under whatever mask the model asks for.

    Args:
        call: The call.

    Returns:
        (B, H, L, Dv).

    Raises:
        ValueError: The model asks for what torch's attention would pass over in silence.
    """
    for name in _UNKNOWN_TO_TORCH:
        if call.options.get(name) is not None:
            raise ValueError(
                f"{call.name} asks for {_OTHER_ATTENTION[name]}, which only the model's own "
                "attention can do: it cannot be converted, not even in part"
            )
    pattern, length = call.pattern, call.query.shape[2]
    window = pattern.window
    if (
        window is not None
        and pattern.unknown is None
        and pattern.sequence_ids is None
        and call.key.shape[2] == length > 4 * (window + 1)
        and not call.dropout
        and not any(call.options.get(name) is not None for name in _OTHER_ATTENTION)
    ):
        return sliding_attention(
            call.query,
            call.key,
            call.value,
            window,
            is_causal=pattern.is_causal,
            key_mask=pattern.key_mask,
            scale=call.scale,
        )
    out, _ = sdpa_attention_forward(
        call.module,
        call.query,
        call.key,
        call.value,
        _dense(call),
        dropout=call.dropout,
        scaling=call.scale,
        is_causal=pattern.is_causal,
        **call.options,
    )
    return out.transpose(1, 2)


def linear_attention(block: FavorBlock, call: AttentionCall) -> Tensor:
    """The call computed by a converted module's features and exact terms.

    Args:
        block: The module's block.
        call: The call.

    Returns:
        (B, H, L, Dv).

    Raises:
        ValueError: The call asks for what linear attention cannot do.
    """
    check_linear(call)
    pattern, cache, length = call.pattern, call.cache_layer, call.query.shape[2]
    key_mask = pattern.key_mask
    if cache is not None and key_mask is not None:
        key_mask = key_mask[:, -length:]
    out, state = block(
        call.query,
        call.key,
        call.value,
        is_causal=pattern.is_causal,
        key_mask=key_mask,
        sequence_ids=pattern.sequence_ids,
        scale=call.scale,
        state=None if cache is None else cache.state,
        return_state=cache is not None,
    )
    if cache is not None:
        cache.set_state(state, length)
    return out


def check_linear(call: AttentionCall) -> None:
    """Refuse what linear attention cannot do.

    Args:
        call: The call.

    Raises:
        ValueError: It asks for something else than softmax under a pattern that has a linear form.
    """
    pattern, length, size = call.pattern, call.query.shape[2], call.key.shape[2]
    problem = next(
        (text for name, text in _OTHER_ATTENTION.items() if call.options.get(name) is not None),
        pattern.unknown,
    )
    if problem is None and call.dropout:
        problem = f"dropout of {call.dropout} on weights that are never formed"
    if problem is None and pattern.window is not None and pattern.window < size - 1:
        problem = f"a sliding window of its own ({pattern.window})"
    if problem is None and call.cache_layer is not None:
        if not pattern.is_causal:
            problem = "a cache in attention that is not causal"
        elif pattern.sequence_ids is not None:
            problem = "a cache together with packed sequences"
    boundaries = call.options.get("cu_seq_lens_q")
    if (
        problem is None
        and pattern.sequence_ids is None
        and boundaries is not None
        and len(boundaries) > 2
    ):
        problem = "packed sequences without the position_ids that tell where each begins"
    if problem is not None:
        raise ValueError(
            f"{call.name} asks for {problem}, which linear attention cannot do: leave this layer "
            "exact with to_performer(..., layers=...)"
        )
    if pattern.is_causal and length != size:
        raise ValueError(
            f"{call.name} has {length} queries and {size} keys: causal attention needs as many "
            "keys as queries, and the past in the cache that the converted model made"
        )


def _pattern(
    module: nn.Module,
    mask: AttentionPattern | Tensor | None,
    is_causal: bool | None,
    device: torch.device,
) -> AttentionPattern:
    if isinstance(mask, AttentionPattern):
        # The layers of a model may be spread over devices.
        return mask.on(device)
    if mask is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        return AttentionPattern(is_causal=bool(causal))
    return AttentionPattern(
        unknown=f"a mask of shape {tuple(mask.shape)} instead of one of shape (batch, length)",
        make_dense=lambda: mask,
    )


def _dense(call: AttentionCall) -> Tensor | None:
    mask = call.pattern.dense()
    return None if mask is None else mask.to(call.query.device)


def _block(call: AttentionCall) -> FavorBlock | None:
    try:
        block: FavorBlock | None = getattr(call.module, BLOCK)
    except AttributeError:
        raise ValueError(
            f"{call.name} has no random features: attn_implementation='favor' is set by "
            "performers.convert.to_performer(model), which adds them; call that on a model loaded "
            "as usual, or performers.convert.load_performer on a saved one"
        ) from None
    return block


def _weights(block: FavorBlock, call: AttentionCall) -> Tensor:
    if call.cache_layer is not None or call.pattern.sequence_ids is not None:
        raise ValueError(
            "output_attentions is not available with a cache or packed sequences; pass "
            "use_cache=False and one sequence in a row"
        )
    return block.weights(
        call.query,
        call.key,
        is_causal=call.pattern.is_causal,
        key_mask=call.pattern.key_mask,
        scale=call.scale,
    )


def _exact_weights(call: AttentionCall) -> Tensor:
    pattern, length, size = call.pattern, call.query.shape[2], call.key.shape[2]
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    scores = call.scale * (call.query @ key.transpose(-1, -2)).float()
    mask = _dense(call)
    if mask is None and pattern.is_causal:
        # Aligned at the last key, where a cache brings more keys than there are queries.
        mask = scores.new_ones(length, size, dtype=torch.bool).tril(size - length)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(call.query.dtype)


def _weights_wanted(options: Mapping[str, Any]) -> bool:
    if options.get("output_attentions"):
        return True
    # Most models record what their modules return, and do not hand the option down to them.
    collected = _active_collector.get() or {}
    return any(name.endswith("attentions") for name in collected)


@contextlib.contextmanager
def intercept_attention(
    modules: Mapping[nn.Module, Callable[[AttentionCall], Tensor]], model: Any
) -> Iterator[None]:
    """Inside this context, calls of some attention modules go to functions of one's own.

    The model, converted or not, runs with the ``"favor"`` implementation meanwhile; modules
    without a function of their own compute what they always do. All is as before afterwards, also
    after an error.

    Args:
        modules: What to call for a module; gets the call, returns (B, H, L, Dv).
        model: The transformers model that they belong to.

    Raises:
        ValueError: The model does not go through the attention interface.
    """
    configs = {
        id(module.config): module.config
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    }
    before = [(config, config._attn_implementation) for config in configs.values()]
    functions: dict[nn.Module, Callable[[AttentionCall], Tensor]] = {
        module: exact_attention
        for _, module in interface_modules(model)
        if not hasattr(module, BLOCK)
    }
    functions.update(modules)
    outer = {module: _INTERCEPTED[module] for module in functions if module in _INTERCEPTED}
    try:
        set_implementation(model)
        _INTERCEPTED.update(functions)
        yield
    finally:
        for module in functions:
            _INTERCEPTED.pop(module, None)
        _INTERCEPTED.update(outer)
        for config, implementation in before:
            config._attn_implementation = implementation


def set_implementation(model: Any) -> None:
    """Let a transformers model and its parts use ``"favor"``.

    Args:
        model: The model.

    Raises:
        ValueError: Its attention does not go through the attention interface.
    """
    model.set_attn_implementation(IMPLEMENTATION)
    left = [
        type(module).__name__
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and module.config._attn_implementation != IMPLEMENTATION
    ]
    if left:
        raise ValueError(
            f"{', '.join(sorted(set(left)))} does not go through the attention interface of "
            "transformers: its attention cannot be made linear"
        )


AttentionInterface.register(IMPLEMENTATION, favor_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, pattern_mask)
