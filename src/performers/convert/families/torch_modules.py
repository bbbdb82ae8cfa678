"""Models built on ``nn.MultiheadAttention`` and torch's Transformer layers.

Each ``nn.MultiheadAttention`` becomes a ``PerformerAttention`` that holds the same parameter
objects. Nothing is changed before everything has been checked and fitted.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from performers.convert.conversion import Conversion
from performers.convert.fitting import check_calibration, fit
from performers.nn import PerformerAttention
from performers.nn.multihead import _is_causal_mask, _key_mask

__all__ = ["convert_torch_modules"]

_PARAMETERS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)
_CALL = inspect.signature(nn.MultiheadAttention.forward)


@dataclass(frozen=True)
class _Found:
    """An attention module of a model; ``is_cross``: known to attend to another sequence."""

    name: str
    module: nn.MultiheadAttention
    is_cross: bool


def convert_torch_modules(
    model: nn.Module,
    settings: Conversion,
    calibration: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Replace ``nn.MultiheadAttention`` modules by ``PerformerAttention``, in place.

    The parameters stay the same objects, so optimizers and tied weights keep working. A module
    that stands in several places is replaced in all of them. ``settings.layers`` counts the modules
    in the order of ``named_modules``; the ``multihead_attn`` of an ``nn.TransformerDecoderLayer``,
    which attends to the memory, is counted and converted only with ``settings.cross_attention``,
    and then has no window and no sinks. Any other module is taken for self-attention: whether it
    is shows only when it is called, and calls with a window and keys of another number than the
    queries are refused.

    Two things differ from the original afterwards. Dropout on attention weights is switched off,
    with a warning. An ``nn.TransformerEncoder`` no longer packs padded batches into nested tensors
    for evaluation, so that outputs at padding are not zeros there (nor are they in training).

    Args:
        model: The model; in its attention, ``attn_mask`` is None or causal.
        settings: What the attention becomes.
        calibration: Batches of model inputs to fit the features to: tensors, tuples of positional
            arguments or mappings of keyword arguments. Used by estimators that are fitted.
        generator: Where the projections are drawn from; None: torch's own.

    Returns:
        Names of the modules that were replaced, in order.

    Raises:
        TypeError: A batch has another type.
        ValueError: There is nothing to convert, a module does what linear attention cannot do, or
            calibration is missing, empty or does not fit; the model is then as it was.
    """
    to_fit = check_calibration(settings, calibration)
    chosen = _chosen(model, settings)
    ours = {found.module: _replacement(found, settings, generator) for found in chosen}
    if to_fit:
        assert calibration is not None
        _calibrate(model, chosen, ours, settings, calibration)
    if settings.learned:
        for performer in ours.values():
            performer.learn_()
    for parent in list(model.modules()):
        # named_children would leave out the second name of a child.
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.MultiheadAttention) and child in ours:
                setattr(parent, name, ours[child])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(child, PerformerAttention) for child in module.modules()
        ):
            # Made for torch's fused layers, which are not run any more.
            module.use_nested_tensor = False
    _expect_calls(model, {found.name: ours[found.module] for found in chosen})
    rates = sorted({found.module.dropout for found in chosen} - {0.0})
    if rates:
        dropped = sum(found.module.dropout > 0 for found in chosen)
        warnings.warn(
            f"the dropout of attention weights ({', '.join(map(str, rates))}) is switched off in "
            f"{dropped} converted layers: linear attention never forms the weights",
            stacklevel=4,
        )
    return [found.name for found in chosen]


class _ExpectedCalls:
    """Names of modules that a model's first forward pass has not called yet, and its hooks."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = dict.fromkeys(names)
        self.handles: list[RemovableHandle] = []

    def called(self, name: str, *args: Any) -> None:
        self.names.pop(name, None)

    def done(self, model: nn.Module, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for handle in self.handles:
            handle.remove()
        if self.names:
            warnings.warn(
                f"the forward pass of {type(model).__name__} did not call {', '.join(self.names)}, "
                "converted to linear attention: it may do without them, or compute their attention "
                "in another way, which is then still exact",
                stacklevel=2,
            )


def _expect_calls(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Warn after the first forward pass of a model if it has not called some modules."""
    expected = _ExpectedCalls(modules)
    expected.handles = [
        module.register_forward_pre_hook(functools.partial(expected.called, name))
        for name, module in modules.items()
    ]
    expected.handles.append(model.register_forward_hook(expected.done))


def _chosen(model: nn.Module, settings: Conversion) -> list[_Found]:
    """The modules to convert, each of which can be."""
    if isinstance(model, nn.MultiheadAttention) and not isinstance(model, PerformerAttention):
        raise ValueError(
            "model is an nn.MultiheadAttention itself, which cannot be replaced in place: pass the "
            "module that holds it, or build a performers.PerformerAttention with its arguments and "
            "load its state_dict with strict=False"
        )
    cross = {
        child.multihead_attn
        for child in model.modules()
        if isinstance(child, nn.TransformerDecoderLayer)
    }
    found = [
        _Found(name, module, module in cross)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, PerformerAttention)
    ]
    candidates = [x for x in found if settings.cross_attention or not x.is_cross]
    if not candidates:
        reason = "has no nn.MultiheadAttention"
        if found:
            reason = "attends from a decoder to an encoder only (cross_attention=True converts it)"
        elif any(isinstance(x, PerformerAttention) for x in model.modules()):
            reason = "is converted already: start from the original model"
        raise ValueError(f"{type(model).__name__} has nothing to convert: it {reason}")
    chosen = settings.choose(candidates)
    for x in chosen:
        _check_module(x)
    return chosen


def _check_module(found: _Found) -> None:
    module = found.module
    reason = None
    if type(module).forward is not nn.MultiheadAttention.forward:
        reason = "has a forward of its own"
    elif parametrize.is_parametrized(module):
        reason = "has parametrized weights; remove_parametrizations leaves plain ones"
    elif any(
        getattr(module, hooks)
        for hooks in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    ):
        reason = "has hooks; remove them, and register them again on its replacement"
    if reason is not None:
        raise ValueError(
            f"{found.name} ({type(module).__name__}) {reason}, which a PerformerAttention in its "
            "place would not have; or leave it exact: name the others with layers"
        )


def _replacement(
    found: _Found, settings: Conversion, generator: torch.Generator | None
) -> PerformerAttention:
    module = found.module
    weight = module.out_proj.weight
    features = settings.features(module.head_dim, module.num_heads, generator)
    try:
        # Its own parameters are never used: they take no memory and no random numbers.
        with torch.device("meta"):
            ours = PerformerAttention(
                module.embed_dim,
                module.num_heads,
                bias=module.in_proj_bias is not None,
                add_bias_kv=module.bias_k is not None,
                add_zero_attn=module.add_zero_attn,
                kdim=module.kdim,
                vdim=module.vdim,
                batch_first=module.batch_first,
                feature_map=features,
                window=None if found.is_cross else settings.window,
                sinks=0 if found.is_cross else settings.sinks,
            )
    except ValueError as error:
        raise ValueError(f"{found.name}: {error}") from error
    for name in _PARAMETERS:
        parameter = getattr(module, name)
        if parameter is not None:
            setattr(ours, name, parameter)
    ours.out_proj = module.out_proj
    ours.feature_map.to(weight.device, weight.dtype)
    ours.training = module.training
    ours.feature_map.train(module.training)
    return ours


def _calibrate(
    model: nn.Module,
    chosen: list[_Found],
    ours: dict[nn.MultiheadAttention, PerformerAttention],
    settings: Conversion,
    batches: Iterable[Any],
) -> None:
    """Run the exact model and fit the features of its replacements to what it computes."""

    @contextmanager
    def observe(add: Callable[..., None]) -> Iterator[None]:
        handles = []
        for found in chosen:
            hook = _observer(found.name, add, ours[found.module], settings.cross_attention)
            handles.append(found.module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            with _without_fused_layers():
                yield
        finally:
            for handle in handles:
                handle.remove()

    favors = {found.name: ours[found.module] for found in chosen}
    fit(model, favors, observe, batches, model)


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Keep torch from computing whole layers at once, which never calls their attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _observer(
    name: str, add: Callable[..., None], performer: PerformerAttention, cross_attention: bool
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = _CALL.bind(module, *args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        inputs: list[Tensor] = [call[part] for part in ("query", "key", "value")]
        if inputs[0].ndim == 2:
            inputs = [x.unsqueeze(0) for x in inputs]
        elif not performer.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        length, size = inputs[0].shape[1], inputs[1].shape[1]
        if length != size:
            _check_cross(name, performer, cross_attention, length, size)
        try:
            is_causal = call["is_causal"] or _is_causal_mask(call["attn_mask"], length, size)
            mask = _key_mask(call["key_padding_mask"], inputs[0].shape[0], size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        query, key, value = performer._project(*inputs)
        extra = performer._extra(key, value)
        if extra is not None and not is_causal:
            key = torch.cat((key, extra[0]), dim=2)
            if mask is not None:
                mask = nn.functional.pad(mask, (0, extra[0].shape[2]), value=True)
        add(name, query, key, is_causal=is_causal, key_mask=mask)

    return observe


def _check_cross(
    name: str, performer: PerformerAttention, cross_attention: bool, length: int, size: int
) -> None:
    """Refuse calls that tell a module to be none of self-attention."""
    exact_terms = performer.window is not None or performer.sinks > 0
    if cross_attention and not exact_terms:
        return
    remedy = "leave it exact: name the others with layers"
    if not exact_terms:
        remedy += ", or pass cross_attention=True"
    raise ValueError(
        f"{name} attends from {length} tokens to {size} others, so that it is no "
        f"self-attention; {remedy}"
    )
