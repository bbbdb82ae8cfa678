"""Models built on ``nn.MultiheadAttention`` and torch's Transformer layers.

Each ``nn.MultiheadAttention`` becomes a ``PerformerAttention`` that holds the same parameter
objects.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from performers.convert.families.base import Family, Site, pre_hooks
from performers.nn import FavorAttention, PerformerAttention

__all__ = ["TorchModules"]

_PARAMETERS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INPUTS = ("query", "key", "value", "key_padding_mask", "attn_mask", "is_causal")
_CALL = inspect.signature(nn.MultiheadAttention.forward)


@dataclass(frozen=True, eq=False)
class TorchSite(Site):
    """An ``nn.MultiheadAttention``."""

    def refusal(self) -> str | None:
        """What a replacement would not have, or None."""
        module = self.module
        if type(module).forward is not nn.MultiheadAttention.forward:
            reason = "has a forward of its own"
        elif parametrize.is_parametrized(module):
            reason = "has parametrized weights; remove_parametrizations leaves plain ones"
        elif any(getattr(module, hooks) for hooks in _HOOKS):
            reason = "has hooks; remove them, and register them again on its replacement"
        else:
            return None
        return (
            f"{reason}, which a PerformerAttention in its place would not have; or leave it exact: "
            "name the others with layers"
        )

    def dropout(self) -> float:
        """The probability that a weight is dropped in training."""
        return self.module.dropout


class TorchModules(Family[TorchSite]):
    """Replaces ``nn.MultiheadAttention`` modules by ``PerformerAttention``.

    The parameters stay the same objects, so optimizers and tied weights keep working. A module
    that stands in several places is replaced in all of them. The ``multihead_attn`` of an
    ``nn.TransformerDecoderLayer``, which attends to the memory, is counted and converted only with
    ``cross_attention``, and then has no window and no sinks. Any other module is taken for
    self-attention: whether it is shows only when it is called, and calls with a window and keys of
    another number than the queries are refused.

    An ``nn.TransformerEncoder`` no longer packs padded batches into nested tensors for evaluation,
    so that outputs at padding are not zeros there (nor are they in training).
    """

    def sites(self) -> list[TorchSite]:
        """The modules in the order of ``named_modules``."""
        model = self.model
        if isinstance(model, nn.MultiheadAttention) and not isinstance(model, PerformerAttention):
            raise ValueError(
                "model is an nn.MultiheadAttention itself, which cannot be replaced in place: pass "
                "the module that holds it, or build a performers.PerformerAttention with its "
                "arguments and load its state_dict with strict=False"
            )
        cross = {
            child.multihead_attn
            for child in model.modules()
            if isinstance(child, nn.TransformerDecoderLayer)
        }
        found = [
            TorchSite(name, module, module in cross, module.head_dim, module.num_heads)
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            and not isinstance(module, PerformerAttention)
        ]
        sites = [x for x in found if self.conversion.cross_attention or not x.is_cross]
        if not sites:
            reason = "has no nn.MultiheadAttention"
            if found:
                reason = (
                    "attends from a decoder to an encoder only (cross_attention=True converts it)"
                )
            elif any(isinstance(x, PerformerAttention) for x in model.modules()):
                reason = "is converted already: start from the original model"
            raise ValueError(f"{self.kind} has nothing to convert: it {reason}")
        return sites

    def build(self, site: TorchSite, generator: torch.Generator | None) -> PerformerAttention:
        """The replacement of a module, with its parameters."""
        module = site.module
        weight = module.out_proj.weight
        favor = self.conversion.attention(
            site.head_dim, site.key_heads, is_cross=site.is_cross, generator=generator
        )
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
                    feature_map=favor.feature_map,
                    window=favor.window,
                    sinks=favor.sinks,
                )
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from error
        for name in _PARAMETERS:
            parameter = getattr(module, name)
            if parameter is not None:
                setattr(ours, name, parameter)
        ours.out_proj = module.out_proj
        ours.feature_map.to(weight.device, weight.dtype)
        ours.training = module.training
        ours.feature_map.train(module.training)
        return ours

    @contextmanager
    def observe(
        self, favors: Mapping[TorchSite, FavorAttention], add: Callable[..., None]
    ) -> Iterator[None]:
        """Report the calls of the modules."""
        hooks = {site.module: self._observer(site, favor, add) for site, favor in favors.items()}
        with pre_hooks(hooks), _without_fused_layers():
            yield

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch of calibration."""
        return self.model(*args, **kwargs)

    def install(self, favors: Mapping[TorchSite, FavorAttention]) -> None:
        """Replace the modules wherever they stand."""
        ours = {site.module: favor for site, favor in favors.items()}
        for parent in list(self.model.modules()):
            # named_children would leave out the second name of a child.
            for name, child in list(parent._modules.items()):
                if isinstance(child, nn.MultiheadAttention) and child in ours:
                    setattr(parent, name, ours[child])
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoder) and any(
                isinstance(child, PerformerAttention) for child in module.modules()
            ):
                # Made for torch's fused layers, which are not run any more.
                module.use_nested_tensor = False
        _expect_calls(self.model, {site.name: favor for site, favor in favors.items()})

    def _observer(
        self, site: TorchSite, favor: FavorAttention, add: Callable[..., None]
    ) -> Callable[..., None]:
        assert isinstance(favor, PerformerAttention)

        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = _CALL.bind(module, *args, **kwargs)
            bound.apply_defaults()
            call = bound.arguments
            query, key = call["query"], call["key"]
            axis = 1 if query.ndim == 3 and favor.batch_first else 0
            length, size = query.shape[axis], key.shape[axis]
            if length != size:
                self._check_cross(site, favor, length, size)
            try:
                heads = favor.head_inputs(**{name: call[name] for name in _INPUTS})
            except ValueError as error:
                raise ValueError(f"{site.name}: {error}") from error
            add(
                site,
                heads.query,
                heads.key,
                is_causal=heads.is_causal,
                key_mask=heads.key_mask,
            )

        return observe

    def _check_cross(self, site: TorchSite, favor: FavorAttention, length: int, size: int) -> None:
        """Refuse calls that tell a module to be none of self-attention."""
        exact_terms = favor.window is not None or favor.sinks > 0
        if self.conversion.cross_attention and not exact_terms:
            return
        remedy = "leave it exact: name the others with layers"
        if not exact_terms:
            remedy += ", or pass cross_attention=True"
        raise ValueError(
            f"{site.name} attends from {length} tokens to {size} others, so that it is no "
            f"self-attention; {remedy}"
        )


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Keep torch from computing whole layers at once, which never calls their attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
