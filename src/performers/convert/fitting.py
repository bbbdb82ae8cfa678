"""Fitting features to the calls that attention layers get while the exact model runs."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from performers.attention import ListedKeys
from performers.convert.settings import ConversionSettings
from performers.features import SoftmaxFeatures

__all__ = ["FeatureFit", "check_calibration", "run_batches"]


class FeatureFit:
    """Streams the queries and keys of one layer's calls into its features; none are kept.

    Padding before the first and after the last key of a row is left out, of queries too where they
    are those of the same tokens: they are no queries that anybody asks.

    Args:
        name: The layer's name, for messages.
        feature_map: The features.
        window: As in ``favor_attention``: pairs that are exact do not count.
        sinks: Likewise.
        listed_keys: Lists of keys to be fitted to the queries, or None.
    """

    def __init__(
        self,
        name: str,
        feature_map: SoftmaxFeatures,
        *,
        window: int | None = None,
        sinks: int = 0,
        listed_keys: ListedKeys | None = None,
    ) -> None:
        self.name = name
        self.feature_map = feature_map
        self.window, self.sinks = window, sinks
        self.buckets = listed_keys
        self._fitted = False

    def add(
        self,
        query: Tensor,
        key: Tensor,
        *,
        is_causal: bool,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Add the pairs of one call.

        Args:
            query: Shape ``(B, H, L, D)``.
            key: Shape ``(B, Hkv, S, D)``.
            is_causal: A query sees itself and what precedes it.
            key_mask: Shape ``(B, S)`` bool, True where a key takes part, or None.
            cu_seqlens: Boundaries of sequences along all rows laid end to end, which do not see
                each other, or None; needs ``L == S``.
            scale: Factor of the scores; None: ``D ** -0.5``.

        Raises:
            ValueError: The call does not fit the features, or holds NaN or infinity.
        """
        for part_query, part_key, part_mask in _sequences(query, key, key_mask, cu_seqlens):
            if not self._counts(part_query.shape[2], part_key, part_mask, is_causal):
                continue
            try:
                self.feature_map.calibrate_(
                    part_query,
                    part_key,
                    part_mask,
                    scale,
                    is_causal=is_causal,
                    window=self.window,
                    sinks=self.sinks,
                )
                if self.buckets is not None:
                    self.buckets.calibrate_(part_query)
            except ValueError as error:
                raise ValueError(f"calibration of {self.name}: {error}") from error
            self._fitted = True

    def check(self) -> None:
        """Refuse features that no call has had a pair for.

        Raises:
            ValueError: There was no call, or the exact terms covered all of them.
        """
        if not self._fitted:
            raise ValueError(
                f"calibration leaves nothing to fit in {self.name}: the model did not call it, or "
                f"window={self.window} and sinks={self.sinks} cover all of the samples; pass "
                "longer samples, a smaller window, or estimator='positive'"
            )

    def _counts(self, length: int, key: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
        """Whether a query meets a key through features."""
        size = key.shape[2]
        if mask is None:
            mask = torch.ones(1, size, dtype=torch.bool, device=key.device)
        far = mask & (mask.cumsum(1) > self.sinks)
        if self.window is not None:
            position = torch.arange(size, device=key.device)
            reach = length - 1 - position
            far = far & ((reach if is_causal else reach.maximum(position)) > self.window)
        return bool(far.any())


def _sequences(
    query: Tensor, key: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
    """Batches without outer padding and with at least one key a row."""
    if cu_seqlens is not None:
        query, key = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (query, key))
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


def check_calibration(settings: ConversionSettings, calibration: Iterable[Any] | None) -> bool:
    """Whether features are to be fitted.

    Args:
        settings: What the features are.
        calibration: Batches, or None.

    Returns:
        Whether the estimator or lists are fitted to data and there are batches.

    Raises:
        ValueError: The estimator is fitted to data, but there is none. Learned features need none:
            they are loaded.
    """
    if calibration is None:
        if settings.calibrated and not settings.learned:
            raise ValueError(
                f"estimator={settings.estimator!r} is fitted to data: pass calibration, a few "
                "batches of the model's inputs, or take estimator='positive'"
            )
        return False
    if not settings.fits:
        warnings.warn(
            f"calibration is not used: estimator={settings.estimator!r} has nothing to fit; "
            "estimator='data_aware' has",
            stacklevel=3,
        )
    return settings.fits


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
