"""Models built on ``nn.MultiheadAttention`` and torch's Transformer layers."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from performers.convert.families.base import Family, Site, pre_hooks
from performers.convert.options import LEAVE_EXACT
from performers.nn import FavorAttention, PerformerAttention

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
        """Reason why a replacement would differ from the module, and the remedy, or None."""
        reason = not_replaceable(self.module, nn.MultiheadAttention)
        return reason and (
            f"{reason}, which a PerformerAttention in its place would not have; or {LEAVE_EXACT}"
        )

    def remove_dropout(self) -> float:
        """Return the dropout probability, which the replacement does not have."""
        return self.module.dropout


def not_replaceable(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Reason why a module is more than its parameters and class, and the remedy, or None."""
    if type(module).forward is not kind.forward:
        return "has a forward of its own"
    if parametrize.is_parametrized(module):
        return "has parametrized weights; remove_parametrizations leaves plain ones"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks; remove them, and register them again on its replacement"
    return None


class TorchModules(Family):
    """Conversion by a ``PerformerAttention`` in place of each ``nn.MultiheadAttention``.

    The parameters stay the same objects, so optimizers and tied weights keep working. A module
    with several names is replaced under all of them. The ``multihead_attn`` of an
    ``nn.TransformerDecoderLayer``, which attends to the memory, is counted and converted only with
    ``cross_attention``, and then has no window and no sinks. Any other module is taken for
    self-attention, and its calls with a window and unequal numbers of queries and keys are refused.

    An ``nn.TransformerEncoder`` no longer packs padded batches into nested tensors for evaluation,
    so that outputs at padding are not zeros, as in training.
    """

    def sites(self) -> list[TorchSite]:
        """List the modules in the order of ``named_modules``."""
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
        sites = [
            TorchSite(name, module, module in cross, module.head_dim, module.num_heads)
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            and not isinstance(module, PerformerAttention)
        ]
        if not sites:
            reason = (
                "has no nn.MultiheadAttention; if its modules call "
                "torch.nn.functional.scaled_dot_product_attention, pass example=, inputs of the "
                "model that show which ones do"
            )
            if any(isinstance(x, PerformerAttention) for x in model.modules()):
                reason = "is converted already: start from the original model"
            raise ValueError(f"{self.kind} has nothing to convert: it {reason}")
        return sites

    def build(self, site: Site, generator: torch.Generator | None) -> PerformerAttention:
        """Build the replacement of a module around its parameters."""
        module = site.module
        weight = module.out_proj.weight
        favor = super().build(site, generator)
        try:
            # On meta, parameters that are replaced take no memory and no random numbers.
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
        self, favors: Mapping[Site, FavorAttention], add: Callable[..., None]
    ) -> Iterator[None]:
        """Report the calls of the modules."""

        def report(site: Site, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            favor = favors[site]
            assert isinstance(favor, PerformerAttention)
            bound = _CALL.bind(module, *args, **kwargs)
            bound.apply_defaults()
            call = bound.arguments
            axis = 1 if call["query"].ndim == 3 and favor.batch_first else 0
            length, size = call["query"].shape[axis], call["key"].shape[axis]
            exact_terms = favor.window is not None or favor.sinks > 0
            if length != size and (exact_terms or not self.conversion.cross_attention):
                remedy = "" if exact_terms else ", or pass cross_attention=True"
                raise ValueError(
                    f"{site.name} attends from {length} tokens to {size} others, so that it is no "
                    f"self-attention: {LEAVE_EXACT}{remedy}"
                )
            try:
                heads = favor.head_inputs(**{name: call[name] for name in _INPUTS})
            except ValueError as error:
                raise ValueError(f"{site.name}: {error}") from error
            add(site, heads.query, heads.key, **heads.options)

        fast = torch.backends.mha.get_fastpath_enabled()
        # The fused layers never call their attention.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with pre_hooks({site.module: functools.partial(report, site) for site in favors}):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a batch of calibration."""
        return self.model(*args, **kwargs)

    def install(self, favors: Mapping[Site, FavorAttention]) -> None:
        """Replace the modules under all their names."""
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
                # Nested tensors are for torch's fused layers alone.
                module.use_nested_tensor = False
