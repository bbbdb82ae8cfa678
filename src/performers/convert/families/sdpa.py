"""Models whose modules call ``scaled_dot_product_attention`` themselves."""

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from performers.attention.sdpa import SdpaCall, read_call
from performers.convert.families.base import Family, Site
from performers.convert.families.torch_modules import TorchModules
from performers.convert.fitting import evaluation, run_batch
from performers.convert.options import FAVOR, LEAVE_EXACT, Conversion
from performers.nn import FavorAttention


class SdpaAttention(FavorAttention):
    """Attention of a module that calls ``scaled_dot_product_attention``.

    Attributes:
        mask_is_causal: Meaning of masks with a row for each query in the example, for compiled
            calls, which cannot read them; None: the example had none.
    """

    mask_is_causal: bool | None = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute attention by the arguments of ``scaled_dot_product_attention``."""
        if dropout_p and not torch.compiler.is_compiling():
            warnings.warn(
                f"the dropout of attention weights ({dropout_p}) is switched off in converted "
                "layers: linear attention never forms the weights",
                stacklevel=2,
            )
        call = read_call(
            query, key, value, attn_mask, is_causal, enable_gqa, mask_is_causal=self.mask_is_causal
        )
        out, _ = self(*call.inputs, scale=scale, **call.masks)
        return call.output(out)


@dataclass(frozen=True, eq=False)
class SdpaSite(Site):
    """A module that called ``scaled_dot_product_attention`` on the example.

    ``problem`` is what linear attention cannot do among its calls. ``like`` has the device and
    dtype of its queries.
    """

    like: Tensor
    mask_is_causal: bool | None
    problem: str | None

    def refusal(self) -> str | None:
        """Reason why the module cannot become linear, and the remedy; None: it can."""
        reason = self.problem
        if reason is None and "forward" in vars(self.module):
            reason = "has a forward of its own, set on the instance, which would not be converted"
        elif reason is None and hasattr(self.module, FAVOR):
            reason = f"has an attribute {FAVOR!r}, the name of the converted attention; rename it"
        return reason and f"{reason}; or {LEAVE_EXACT}"


class SdpaModules(TorchModules):
    """Conversion of the modules that call ``scaled_dot_product_attention`` on an example.

    Unequal numbers of queries and keys mark attention between two sequences, unless it is causal.

    A module counts as the caller if it is the innermost one whose forward pass runs. It gets a
    `SdpaAttention` as a submodule, and a subclass of its class whose forward pass sends its calls
    there, however the function was imported. Modules with ``nn.MultiheadAttention`` are converted
    as by `TorchModules`.
    """

    def __init__(self, model: Any, conversion: Conversion, example: Any) -> None:
        super().__init__(model, conversion)
        self.example = example
        multihead = any(isinstance(x, nn.MultiheadAttention) for x in self.model.modules())
        self.takes_lists = not multihead

    def sites(self) -> list[Any]:
        """Run the model on the example and list the modules, in the order of the model."""
        if any(isinstance(module, _Redirected) for module in self.model.modules()):
            raise ValueError(f"{self.kind} is converted already: start from the original model")
        seen: dict[nn.Module, list[dict[str, Any]]] = {}

        def keep(owner: nn.Module, call: dict[str, Any]) -> None:
            seen.setdefault(owner, []).append(call)

        with _watched(self.model, keep), evaluation(self.model):
            run_batch(self, self.example)
        names = {module: name for name, module in self.model.named_modules()}
        own = {m: _site(names[m] or "the model", m, calls) for m, calls in seen.items()}
        self.called = own
        others = {} if self.takes_lists else {x.module: x for x in super().sites()}
        sites: dict[nn.Module, Any] = {**others, **own}
        if not sites:
            raise ValueError(
                f"{self.kind} has nothing to convert: on the example no module called "
                "torch.nn.functional.scaled_dot_product_attention, and none is an "
                "nn.MultiheadAttention; write attention by matrix products as a call of the former"
            )
        return [sites[module] for module in names if module in sites]

    def prepare(self, sites: Sequence[Site]) -> Collection[Site]:
        """Return the modules that the example called; refuse one around a module left exact."""
        chosen = {site.module: site for site in sites if isinstance(site, SdpaSite)}
        for module, site in chosen.items():
            inside = set(module.modules())
            for inner in self.called.values():
                if inner.module in inside and inner.module not in chosen:
                    raise ValueError(
                        f"{inner.name} is inside {site.name}, whose calls of "
                        "scaled_dot_product_attention become linear, and could not stay exact: "
                        "convert both or neither, by layers or cross_attention"
                    )
        return list(chosen.values())

    def build(self, site: Site, generator: torch.Generator | None) -> Any:
        """Build the attention of one module, where its queries are."""
        if not isinstance(site, SdpaSite):
            return super().build(site, generator)
        favor = Family.build(self, site, generator)
        ours = SdpaAttention(
            favor.feature_map, window=favor.window, sinks=favor.sinks, listed_keys=favor.buckets
        )
        ours.mask_is_causal = site.mask_is_causal
        return ours.to(site.like.device, site.like.dtype).train(site.module.training)

    @contextmanager
    def observe(
        self, favors: Mapping[Site, FavorAttention], add: Callable[..., None]
    ) -> Iterator[None]:
        """Report the calls of the modules."""
        own = {site.module: site for site in favors if isinstance(site, SdpaSite)}

        def report(owner: nn.Module, call: dict[str, Any]) -> None:
            if owner in own:
                read = _read(call)
                query, key, _ = read.inputs
                add(own[owner], query, key, scale=call.get("scale"), **read.masks)

        others = {site: favor for site, favor in favors.items() if site.module not in own}
        with super().observe(others, add), _watched(self.model, report):
            yield

    def install(self, favors: Mapping[Site, FavorAttention]) -> None:
        """Add the attention to the modules and send their calls there."""
        super().install({s: favor for s, favor in favors.items() if not isinstance(s, SdpaSite)})
        for site, favor in favors.items():
            if isinstance(site, SdpaSite):
                site.module.add_module(FAVOR, favor)
                site.module.__class__ = _redirected(site.module.__class__)


def _read(call: dict[str, Any]) -> SdpaCall:
    if "num_heads" in call:
        raise ValueError(
            "called torch.nn.functional.multi_head_attention_forward, inside which no call can be "
            "replaced: use an nn.MultiheadAttention, or call scaled_dot_product_attention"
        )
    others = ("dropout_p", "scale")
    try:
        return read_call(**{name: call[name] for name in call if name not in others})
    except ValueError as error:
        raise ValueError(
            f"called scaled_dot_product_attention in a way that is not linear: {error}"
        ) from error


def _site(name: str, module: nn.Module, calls: Sequence[dict[str, Any]]) -> SdpaSite:
    """Describe a module by its calls on the example."""
    shapes, causal, problem = set(), set(), None
    for call in calls:
        query, key, mask = call["query"], call["key"], call.get("attn_mask")
        try:
            masks = _read(call).masks
        except ValueError as error:
            problem, masks = str(error), {"is_causal": False}
        if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            causal.add(masks["is_causal"])
        is_cross = query.shape[-2] != key.shape[-2] and not masks["is_causal"]
        heads = tuple(x.shape[-3] if x.ndim > 3 else 1 for x in (query, key))
        shapes.add((*heads, query.shape[-1], is_cross))
    *_, key_heads, head_dim, is_cross = min(shapes)
    if len(shapes) > 1:
        kinds = ", ".join(
            f"{'cross' if x[-1] else 'self'}-attention with {x[0]} heads ({x[1]} of keys) of {x[2]}"
            for x in sorted(shapes)
        )
        problem = problem or (
            f"calls scaled_dot_product_attention in several ways ({kinds}), which cannot share "
            "features: move each into a module of its own"
        )
    mask_is_causal = causal.pop() if len(causal) == 1 else None
    like = calls[0]["query"].new_empty(0)
    return SdpaSite(name, module, is_cross, head_dim, key_heads, like, mask_is_causal, problem)


_NAMES = tuple(inspect.signature(SdpaAttention.attend).parameters)[1:]
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


class _Watch(TorchFunctionMode):
    """Reports calls of attention functions, by the names of their arguments.

    Of ``multi_head_attention_forward``, whose own calls no mode sees, it reports ``num_heads``, and
    query and key as one head.
    """

    def __init__(self, seen: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen({**dict(zip(_NAMES, args, strict=False)), **kwargs})
        elif func is F.multi_head_attention_forward:
            call = _MULTI_HEAD.bind(*args, **kwargs).arguments
            query, key = (call[name].movedim(0, -2).unsqueeze(-3) for name in ("query", "key"))
            self.seen({"query": query, "key": key, "num_heads": call["num_heads"]})
        return func(*args, **kwargs)


@contextmanager
def _watched(model: nn.Module, seen: Callable[[nn.Module, dict[str, Any]], None]) -> Iterator[None]:
    """Report the calls of attention functions and the innermost module of each."""
    running: list[nn.Module] = []

    def report(call: dict[str, Any]) -> None:
        if not ("num_heads" in call and isinstance(running[-1], nn.MultiheadAttention)):
            seen(running[-1], call)

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_pre_hook(enter))
            stack.enter_context(module.register_forward_hook(leave, always_call=True))
        # A compiled part would hide its calls.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_Watch(report))
        yield


class _Redirect(TorchFunctionMode):
    """Sends calls of ``scaled_dot_product_attention`` to the attention of a converted module."""

    def __init__(self, favor: SdpaAttention) -> None:
        super().__init__()
        self.favor, self.has_gradients = favor, torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if self.has_gradients and not torch.is_grad_enabled():
                raise RuntimeError(
                    "a converted module switches gradients off around its attention, as "
                    "torch.utils.checkpoint(use_reentrant=True) does inside of it, which would "
                    "recompute exact attention: checkpoint the module as a whole"
                )
            return self.favor.attend(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if torch.compiler.is_compiling() and getattr(Tensor, name, None) is func:
            # The compiler cannot trace into methods of tensors that are written in Python.
            return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*args, **kwargs)


class _Redirected(nn.Module):
    """Base of the classes of converted modules, before the class they had."""

    _exact_class: type[nn.Module]
    favor: SdpaAttention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Redirect(self.favor):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str) or getattr(reduced[0], "__name__", None) != "__newobj__":
            raise TypeError(
                f"{self._exact_class.__name__} pickles itself in a way of its own, which would "
                "leave the conversion out: save its state_dict"
            )
        # pickle finds classes by name, and this one has none.
        return _new, (self._exact_class,), *reduced[2:]


@functools.cache
def _redirected(exact: Any) -> type[nn.Module]:
    """The class of a converted module, with the name of its exact class."""
    names = {name: getattr(exact, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(exact.__name__, (_Redirected, exact), {**names, "_exact_class": exact})


def _new(exact: Any) -> Any:
    kind: Any = _redirected(exact)
    return kind.__new__(kind)
