"""Calls of converted models inside ``performers.distributed.sequence_parallel``.

A process has one shard of a row there, and a model that counts its positions itself counts them
from 0 in each. `check_shards` finds by trial what a model computes of positions.
"""

import functools
import inspect
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from performers.attention.sharding import current_sharding
from performers.convert.families.base import without_cache
from performers.convert.families.trial import close, outputs_of, token_ids
from performers.convert.fitting import evaluation
from performers.convert.interface.call import AttentionCall
from performers.convert.interface.implementation import intercept_attention, interface_modules
from performers.models.arguments import is_tracing

_CONTEXT = "inside performers.distributed.sequence_parallel"
_REFUSALS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_running = threading.local()


def check_shards(model: Any) -> None:
    """Check by trial that a model computes the same of a shard as of the whole row.

    With attention that mixes no positions, the outputs, queries, keys and values of some tokens
    must be those of the same tokens in a longer row, where their positions in it are passed.

    Raises:
        ValueError: The model does not follow ``position_ids`` that count from 0, computes rotary
            frequencies from the longest row, or mixes tokens outside its attention.
    """
    if model not in _REFUSALS:
        _REFUSALS[model] = _refusal(model)
    if (reason := _REFUSALS[model]) is not None:
        raise ValueError(
            f"{type(model).__name__} {_CONTEXT} {reason}: call it outside the context, on whole "
            "rows; several processes then train data parallel"
        )


def enter_shard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a shard without the positions of its tokens in the row; a forward pre-hook."""
    sharding = current_sharding()
    if sharding is None or getattr(_running, "trial", False):
        return
    signature = inspect.signature(type(module).forward)
    call = signature.bind_partial(module, *args, **kwargs).arguments
    if not is_tracing():
        check_shards(module)
    if module.training:
        check_layers_run(module)
    if call.get("position_ids") is None:
        raise ValueError(
            f"position_ids must be passed to {type(module).__name__} {_CONTEXT}, which would "
            "count the tokens of each process from 0: performers.distributed.shard adds those of "
            "the whole row to a batch"
        )
    if call.get("attention_mask") is None:
        sharding.tell_positions(call["position_ids"])


def check_layers_run(model: Any) -> None:
    """Check that all processes run the same layers of a model in training.

    Raises:
        ValueError: The model leaves out layers at random, in each process others.
    """
    config = model.config.to_dict()
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if config.get(name):
            raise ValueError(
                f"{name}={config[name]} lets each process leave out other layers, while the rest "
                f"wait for their messages: set {name} to 0 in the configuration"
            )


def _refusal(model: Any) -> str | None:
    """Reason why a model cannot take shards; None: it can."""
    names = inspect.signature(type(model).forward).parameters
    if getattr(model.config, "model_type", None) == "performer":
        # Checks its own arguments.
        return None
    if getattr(model.config, "is_encoder_decoder", False):
        return "would need two rows, of its encoder and its decoder"
    if not {"input_ids", "position_ids"} <= set(names):
        return "takes no position_ids, and would count the tokens of each process from 0"
    if (rope := _rope_of_row(model)) is not None:
        return (
            f"computes the frequencies of its rotary positions ({rope!r}) from the largest "
            "position of a call, which each process would take from its own shard"
        )
    _running.trial = True
    try:
        with evaluation(model), torch.random.fork_rng():
            return _trial(model)
    finally:
        _running.trial = False


def _rope_of_row(model: nn.Module) -> str | None:
    """Type of rotary positions that depends on the length of a row, or None."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                return kind
    return None


def _trial(model: Any) -> str | None:
    device = next(model.parameters()).device
    ids = token_ids(model.config, torch.Generator().manual_seed(0)).to(device)
    length = ids.shape[1]
    start = length // 2
    whole = _pointwise(model, {"input_ids": ids})
    positions = torch.arange(start, length, device=device).expand(len(ids), -1)
    part = _pointwise(model, {"input_ids": ids[:, start:], "position_ids": positions})
    if whole is None or part is None:
        return "does not take made-up input_ids and position_ids, so that nothing is known of it"
    (outputs, calls), (own, own_calls) = whole, part
    if [x.ndim for x in own] != [x.ndim for x in outputs] or len(calls) != len(own_calls):
        return "computes something else of a part of a row"
    if not close(own_calls, [x[:, :, start:] for x in calls]):
        return (
            "does not follow position_ids that count from 0 (it counts from another number, or "
            "computes positions itself), so that shards would be computed at wrong positions"
        )
    rows = [
        (x, y) for x, y in zip(own, outputs, strict=True) if y.ndim > 2 and y.shape[1] == length
    ]
    if not rows or not close([x for x, _ in rows], [y[:, start:] for _, y in rows]):
        return "pools over a row or mixes its tokens outside its attention"
    return None


def _pointwise(model: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]] | None:
    """Outputs of a model whose attention mixes nothing, and its queries, keys and values."""
    calls: list[Tensor] = []

    def attend(call: AttentionCall) -> Tensor:
        calls.extend((call.query, call.key, call.value))
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)

    functions = {module: attend for _, module in interface_modules(model)}
    inputs = {**inputs, **without_cache(model)}
    # The parameters of a model that FSDP2 has sharded are at hand: this is its forward pass.
    with intercept_attention(functions, model):
        outputs = outputs_of(functools.partial(type(model).forward, model), inputs)
    return None if outputs is None else (outputs, calls)
