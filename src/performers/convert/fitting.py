"""Fitting features to the calls that attention layers get while the exact model runs."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from performers.convert.conversion import Conversion
from performers.nn import FavorAttention
from performers.nn.favor import end_to_end

__all__ = ["check_calibration", "fit", "run_batches"]


def fit(
    model: nn.Module,
    favors: Mapping[str, FavorAttention],
    observe: Callable[[Callable[..., None]], AbstractContextManager[Any]],
    batches: Iterable[Any],
    call: Callable[..., Any],
) -> None:
    """Run an exact model and calibrate attention modules on the calls of its layers.

    Queries and keys are streamed, none are kept. The statistics of a layer are those of the exact
    model, whatever the layers before it will become.

    Args:
        model: The model.
        favors: Modules to calibrate, by the names of their layers.
        observe: Makes a context in which each attention call of a layer is reported to the
            function that it is given: the layer's name, then as in `_calibrate`.
        batches: As in `run_batches`.
        call: Likewise.

    Raises:
        TypeError: A batch has another type.
        ValueError: There is no batch, a batch does not fit, or a layer has no pair to be fitted to.
    """
    fitted = set()

    def add(name: str, query: Tensor, key: Tensor, **options: Any) -> None:
        try:
            if _calibrate(favors[name], query, key, **options):
                fitted.add(name)
        except ValueError as error:
            raise ValueError(f"calibration of {name}: {error}") from error

    with observe(add):
        run_batches(model, batches, call)
    for name, favor in favors.items():
        if name not in fitted:
            raise ValueError(
                f"calibration leaves nothing to fit in {name}: the model did not call it, or "
                f"window={favor.window} and sinks={favor.sinks} cover all of the samples; pass "
                "longer samples, a smaller window, or estimator='positive'"
            )


def _calibrate(
    favor: FavorAttention,
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> bool:
    """Add the pairs of one call; whether it has any that are not exact.

    Padding before the first and after the last key of a row is left out, of queries too where they
    are those of the same tokens: they are no queries that anybody asks.
    """
    counted = False
    for part_query, part_key, part_mask in _sequences(query, key, key_mask, cu_seqlens):
        if _leaves_pairs(favor, part_query.shape[2], part_key, part_mask, is_causal):
            favor.calibrate_(part_query, part_key, part_mask, scale, is_causal=is_causal)
            counted = True
    return counted


def _leaves_pairs(
    favor: FavorAttention, length: int, key: Tensor, mask: Tensor | None, is_causal: bool
) -> bool:
    """Whether a query meets a key through features."""
    size = key.shape[2]
    if mask is None:
        mask = torch.ones(1, size, dtype=torch.bool, device=key.device)
    far = mask & (mask.cumsum(1) > favor.sinks)
    if favor.window is not None:
        position = torch.arange(size, device=key.device)
        reach = length - 1 - position
        far = far & ((reach if is_causal else reach.maximum(position)) > favor.window)
    return bool(far.any())


def _sequences(
    query: Tensor, key: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
    """Batches without outer padding and with at least one key a row."""
    if cu_seqlens is not None:
        query, key = (end_to_end(x) for x in (query, key))
        bounds = cu_seqlens.tolist()
        for start, stop in itertools.pairwise(bounds):
            part = None if mask is None else mask.reshape(1, -1)[:, start:stop]
            yield from _sequences(query[:, :, start:stop], key[:, :, start:stop], part, None)
        return
    if mask is None or bool(mask.all()):
        yield query, key, None
        return
    # Rows with the same span go together: every call fits the features again.
    spans: dict[tuple[int, int], list[int]] = {}
    for row in range(len(mask)):
        taking_part = mask[row].nonzero()
        if len(taking_part):
            span = int(taking_part[0]), int(taking_part[-1]) + 1
            spans.setdefault(span, []).append(row)
    same_tokens = query.shape[2] == key.shape[2]
    for (start, stop), rows in spans.items():
        queries = query[rows][:, :, start:stop] if same_tokens else query[rows]
        yield queries, key[rows][:, :, start:stop], mask[rows][:, start:stop]


def check_calibration(conversion: Conversion, calibration: Iterable[Any] | None) -> bool:
    """Whether attention modules are to be calibrated.

    Args:
        conversion: The conversion.
        calibration: Batches, or None.

    Raises:
        ValueError: The estimator is fitted to data, but there is none. Learned features need none:
            they are loaded.
    """
    estimator = conversion.estimator
    if calibration is None:
        if conversion.is_calibrated and not conversion.learned:
            raise ValueError(
                f"estimator={estimator!r} is fitted to data: pass calibration, a few "
                "batches of the model's inputs, or take estimator='positive'"
            )
        return False
    if not conversion.needs_samples:
        warnings.warn(
            f"calibration is not used: estimator={estimator!r} has nothing to fit; "
            "estimator='data_aware' has",
            stacklevel=3,
        )
    return conversion.needs_samples


def run_batches(model: nn.Module, batches: Iterable[Any], call: Callable[..., Any]) -> None:
    """Run a model over batches in evaluation mode, without gradients; modes are restored.

    Args:
        model: Whose modes and device count.
        batches: Each a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments; tensors are moved to the device of the model's first parameter.
        call: What is called with a batch's arguments: the model, or a wrapping of it.

    Raises:
        TypeError: A batch is something else.
        ValueError: There is no batch.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    modes = [(module, module.training) for module in model.modules()]
    count = 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, Tensor):
                    call(moved(batch))
                elif isinstance(batch, Mapping):
                    call(**{name: moved(value) for name, value in batch.items()})
                elif isinstance(batch, (tuple, list)):
                    call(*(moved(value) for value in batch))
                else:
                    raise TypeError(
                        "a batch of calibration must be a tensor, a tuple of the model's "
                        "positional arguments or a mapping of its keyword arguments, got "
                        f"{type(batch).__name__}"
                    )
                count += 1
    finally:
        for module, training in modes:
            module.training = training
    if not count:
        raise ValueError("calibration must yield at least one batch of model inputs, got none")
