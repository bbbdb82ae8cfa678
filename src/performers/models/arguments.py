"""Arguments of a forward call, as transformers and its collators name them.

transformers 5.24 renamed the cache from ``past_key_values`` to ``cache``. `CACHE_KEYWORD` is the
name that the installed release uses; every other module asks here.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

CACHE_KEYWORDS = ("cache", "past_key_values")
# Collators that pack sequences into one row pass these; the maximal lengths follow from the others.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "max_length_q", "max_length_k")
_LOSS_OPTIONS = ("num_items_in_batch", "ignore_index", "shift_labels")


def is_tracing() -> bool:
    """True while torch traces or compiles, when nothing may depend on the values of an input."""
    jit: Any = torch.jit
    return jit.is_tracing() or torch.compiler.is_compiling()


def cache_keyword(function: Callable[..., Any]) -> str:
    """Name of the cache among the arguments of a function of transformers."""
    parameters = inspect.signature(function).parameters
    name = next((name for name in CACHE_KEYWORDS if name in parameters), None)
    if name is None:
        raise ValueError(
            f"{getattr(function, '__qualname__', function)} takes its cache under none of the "
            f"names {', '.join(CACHE_KEYWORDS)}; this version of performers does not know the "
            "installed transformers: install the release that constraints.txt names"
        )
    return name


CACHE_KEYWORD = cache_keyword(GenerationMixin.prepare_inputs_for_generation)


def either_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache of a call, passed under one of its names."""
    if past_key_values is not None and cache is not None:
        raise ValueError("cache and past_key_values name the same argument: pass one of them")
    return cache if past_key_values is None else past_key_values


def with_both_cache_names(output_class: type) -> type:
    """Class decorator that gives the cache of an output both names."""
    other = next(name for name in CACHE_KEYWORDS if name != CACHE_KEYWORD)
    setattr(output_class, other, property(lambda self: getattr(self, CACHE_KEYWORD)))
    return output_class


def take_loss_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of transformers' loss functions from the arguments of a call."""
    return {name: arguments.pop(name) for name in _LOSS_OPTIONS if name in arguments}


def check_cache_position(position: Tensor | None, past: int) -> None:
    """Check that the position that some releases of transformers pass is the cache's end."""
    if position is None or is_tracing():
        return
    if position.numel() and int(position.reshape(-1)[0]) != past:
        raise ValueError(
            f"cache_position begins at {int(position.reshape(-1)[0])}, but the cache holds {past} "
            f"tokens: pass the cache of the earlier call ({CACHE_KEYWORD}), or the whole sequence"
        )


def check_no_others(model: object, arguments: Mapping[str, Any]) -> None:
    """Refuse unknown arguments that are not None."""
    others = sorted(name for name, value in arguments.items() if value is not None)
    if others:
        raise TypeError(
            f"{type(model).__name__} does not know the argument(s) {', '.join(others)}: leave them "
            "out (the documentation of forward() lists what it takes)"
        )


def run_starts(ids: Tensor) -> Tensor:
    """First tokens of the runs of equal ids ``(B, L)`` in each row, bool."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return starts


def boundaries(starts: Tensor) -> Tensor:
    """Boundaries of packed sequences along all rows laid end to end, by their first tokens."""
    offsets = starts.flatten().nonzero().squeeze(-1)
    return torch.cat((offsets, offsets.new_full((1,), starts.numel())))


def sequence_starts(
    shape: tuple[int, int],
    *,
    device: torch.device,
    position_ids: Tensor | None,
    sequence_ids: Tensor | None,
    masked: bool,
    packing: Mapping[str, Any],
) -> Tensor | None:
    """First tokens of the sequences that are packed into rows, ``(B, L)`` bool, or None.

    Packing is described by ``sequence_ids``, by the ``cu_seq_lens_q`` or ``seq_idx`` of
    transformers' padding-free collators (``packing``, the values of `PACKING` arguments), or by
    ``position_ids`` that restart at 0, unless the call has a mask or a past (``masked``).

    Raises:
        ValueError: A shape does not fit, positions fall to another value than 0, or two
            descriptions contradict each other.
    """
    batch, length = shape
    descriptions: dict[str, Tensor] = {}
    for name, ids in (("sequence_ids", sequence_ids), ("seq_idx", packing.get("seq_idx"))):
        if ids is None:
            continue
        if ids.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(ids.shape)}")
        descriptions[name] = run_starts(ids).to(device)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        offsets = packing.get(name)
        if offsets is None:
            continue
        total = batch * length
        if batch != 1 or offsets.ndim != 1 or int(offsets[0]) or int(offsets[-1]) != total:
            raise ValueError(
                f"{name} must run from 0 to the length of a single row ({length}), got "
                f"{tuple(offsets.shape)} offsets for an input of shape {shape}"
            )
        starts = torch.zeros(total, dtype=torch.bool, device=device)
        starts[offsets[:-1].to(device).long()] = True
        descriptions[name] = starts.view(shape)
    if position_ids is not None and not masked and length > 1:
        positions = position_ids.expand(batch, -1).to(device)
        falls = torch.zeros(shape, dtype=torch.bool, device=device)
        falls[:, 1:] = positions[:, 1:] <= positions[:, :-1]
        if bool(falls.any()):
            if bool((falls & (positions != 0)).any()):
                raise ValueError(
                    "position_ids fall or repeat within a row at another position than 0, so that "
                    "they do not tell where packed sequences begin: pass sequence_ids, or an "
                    "attention_mask of ones if each row is one sequence"
                )
            falls[:, 0] = True
            descriptions["position_ids"] = falls
    if not descriptions:
        return None
    name, starts = next(iter(descriptions.items()))
    for other, theirs in descriptions.items():
        # With sequence_ids, positions are free.
        if name != "sequence_ids" and not bool((theirs == starts).all()):
            raise ValueError(f"{name} and {other} tell different boundaries of packed sequences")
    return starts
