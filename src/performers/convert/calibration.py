"""Fitting the features of converted layers to what the exact model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from performers.convert.block import FavorBlock
from performers.convert.interface import (
    AttentionCall,
    check_linear,
    exact_attention,
    intercept_attention,
)
from performers.features import SoftmaxFeatures

__all__ = ["calibrate_blocks", "call_model"]


def calibrate_blocks(
    model: Any, blocks: Mapping[nn.Module, FavorBlock], batches: Iterable[Any]
) -> None:
    """Run the model with exact attention and stream queries and keys into its features.

    No batch is kept. The statistics of a layer are those of the exact model, whatever the layers
    before it will become.

    Args:
        model: A transformers model.
        blocks: The block of each attention module to be calibrated.
        batches: Inputs of the model, see `call_model`.

    Raises:
        ValueError: There is no batch, or a batch does not fit.
    """

    def observer(block: FavorBlock) -> Callable[[AttentionCall], Tensor]:
        def observe(call: AttentionCall) -> Tensor:
            check_linear(call)
            if call.pattern.sequence_ids is not None:
                raise ValueError(
                    "calibration has packed sequences (position_ids that begin again): pass one "
                    "sequence a row with its attention_mask"
                )
            features = block.feature_map
            assert isinstance(features, SoftmaxFeatures)
            features.calibrate_(
                call.query.detach(),
                call.key.detach(),
                call.pattern.key_mask,
                call.scale,
                is_causal=call.pattern.is_causal,
                window=block.window,
                sinks=block.sinks,
            )
            return exact_attention(call)

        return observe

    training = model.training
    count = 0
    model.eval()
    try:
        with (
            torch.no_grad(),
            intercept_attention({m: observer(block) for m, block in blocks.items()}, model),
        ):
            for batch in batches:
                call_model(model, batch)
                count += 1
    finally:
        model.train(training)
    if not count:
        raise ValueError("calibration must yield at least one batch of model inputs, got none")


def call_model(model: Any, batch: Any) -> Any:
    """Run a model on a batch, without a cache.

    Args:
        model: A transformers model.
        batch: A mapping of keyword arguments (labels are left out), or a tensor that is the
            model's main input.

    Returns:
        The model's output.

    Raises:
        TypeError: The batch is neither.
    """
    if isinstance(batch, Tensor):
        batch = {model.main_input_name: batch}
    if not isinstance(batch, Mapping):
        raise TypeError(
            "a batch must be a mapping of the model's keyword arguments or a tensor of its main "
            f"input ({model.main_input_name}), got {type(batch).__name__}"
        )
    inputs = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    if getattr(model.config, "use_cache", None):
        inputs["use_cache"] = False
    return model(**inputs)
