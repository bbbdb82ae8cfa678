"""Calibration of attention modules on the calls of an exact model's layers."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from performers.convert.options import Conversion
from performers.nn import FavorAttention
from performers.nn.favor import end_to_end

if TYPE_CHECKING:
    from performers.convert.families.base import Family, Site


def check_calibration(conversion: Conversion, calibration: Iterable[Any] | None) -> bool:
    """Check that an estimator gets the samples it needs; returns True if they are used."""
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
            stacklevel=4,
        )
    return conversion.needs_samples


def fit(family: Family, favors: Mapping[Site, FavorAttention], batches: Iterable[Any]) -> None:
    """Run an exact model and calibrate attention modules on the calls of its layers.

    Queries and keys are streamed, none are kept. The statistics of a layer are those of the exact
    model, independent of the conversion of earlier layers. Padding before the first and after the
    last key of a row is left out, and so are the queries of the same tokens in self-attention.
    """
    fitted = set()

    def add(site: Site, query: Tensor, key: Tensor, *, is_causal: bool, **options: Any) -> None:
        favor, scale = favors[site], options.pop("scale", None)
        try:
            for queries, keys, mask in _sequences(query, key, **options):
                if _leaves_pairs(favor, queries.shape[2], keys, mask, is_causal):
                    favor.calibrate_(queries, keys, mask, scale, is_causal=is_causal)
                    fitted.add(site)
        except ValueError as error:
            raise ValueError(f"calibration of {site.name}: {error}") from error

    ran = False
    with family.observe(favors, add), evaluation(family.model):
        for batch in batches:
            run_batch(family, batch)
            ran = True
    if not ran:
        raise ValueError("calibration must yield at least one batch of model inputs, got none")
    for site, favor in favors.items():
        if site not in fitted:
            raise ValueError(
                f"calibration leaves nothing to fit in {site.name}: the model did not call it, or "
                f"window={favor.window} and sinks={favor.sinks} cover all of the samples; pass "
                "longer samples, a smaller window, or estimator='positive'"
            )


def run_batch(family: Family, batch: Any) -> None:
    """Run a model on a batch, its tensors moved to the device of the model.

    A batch is a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
    """
    device = next(family.model.parameters(), torch.empty(0, device="cpu")).device

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        family.call(**{name: moved(value) for name, value in batch.items()})
    elif isinstance(batch, (Tensor, tuple, list)):
        family.call(*map(moved, (batch,) if isinstance(batch, Tensor) else batch))
    else:
        raise TypeError(
            "a batch of calibration, or an example, must be a tensor, a tuple of the model's "
            "positional arguments or a mapping of its keyword arguments, got "
            f"{type(batch).__name__}"
        )


def _leaves_pairs(
    favor: FavorAttention, length: int, key: Tensor, mask: Tensor | None, is_causal: bool
) -> bool:
    """Return True if some pair is not exact."""
    size = key.shape[2]
    if mask is None:
        mask = torch.ones(1, size, dtype=torch.bool, device=key.device)
    estimated = mask & (mask.cumsum(1) > favor.sinks)
    if favor.window is not None:
        position = torch.arange(size, device=key.device)
        after = length - 1 - position
        distance = after if is_causal else after.maximum(position)
        estimated = estimated & (distance > favor.window)
    return bool(estimated.any())


def _sequences(
    query: Tensor, key: Tensor, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
    """Batches without outer padding and with at least one key a row."""
    if cu_seqlens is not None:
        query, key = (end_to_end(x) for x in (query, key))
        for start, stop in itertools.pairwise(cu_seqlens.tolist()):
            part = None if key_mask is None else key_mask.reshape(1, -1)[:, start:stop]
            yield from _sequences(query[:, :, start:stop], key[:, :, start:stop], part)
        return
    if key_mask is None or bool(key_mask.all()):
        yield query, key, None
        return
    # Rows with the same span go together: every call fits the features again.
    spans: dict[tuple[int, int], list[int]] = {}
    for row, mask in enumerate(key_mask):
        keys = mask.nonzero()
        if len(keys):
            spans.setdefault((int(keys[0]), int(keys[-1]) + 1), []).append(row)
    same_tokens = query.shape[2] == key.shape[2]
    for (start, stop), rows in spans.items():
        queries = query[rows][:, :, start:stop] if same_tokens else query[rows]
        yield queries, key[rows][:, :, start:stop], key_mask[rows][:, start:stop]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the modes of all modules are restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
