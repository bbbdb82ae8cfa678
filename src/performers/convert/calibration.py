"""Fitting the features of converted layers to what the exact model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from performers.convert.block import FavorBlock, boundaries
from performers.convert.calls import AttentionCall, check_linear, exact_attention
from performers.convert.fitting import FeatureFit, run_batches
from performers.convert.interface import intercept_attention
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
        batches: Inputs of the model: mappings of keyword arguments, or tensors of its main input.

    Raises:
        ValueError: There is no batch, a batch does not fit, or a layer has no pair to be fitted to.
    """
    fits: list[FeatureFit] = []

    def observer(block: FavorBlock, name: str) -> Callable[[AttentionCall], Tensor]:
        assert isinstance(block.feature_map, SoftmaxFeatures)
        fit = FeatureFit(
            name,
            block.feature_map,
            window=block.window,
            sinks=block.sinks,
            listed_keys=block.buckets,
        )
        fits.append(fit)

        def observe(call: AttentionCall) -> Tensor:
            check_linear(call)
            pattern = call.pattern
            ids = pattern.sequence_ids
            fit.add(
                call.query,
                call.key,
                is_causal=pattern.is_causal,
                key_mask=pattern.key_mask,
                cu_seqlens=None if ids is None else boundaries(ids),
                scale=call.scale,
            )
            return exact_attention(call)

        return observe

    names = {module: name for name, module in model.named_modules()}
    functions = {module: observer(block, names[module]) for module, block in blocks.items()}
    with intercept_attention(functions, model):
        run_batches(model, batches, lambda *args, **kwargs: call_model(model, *args, **kwargs))
    for fit in fits:
        fit.check()


def call_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a model without a cache, and without labels unless it makes its decoder's inputs of them.

    Args:
        model: A transformers model.
        *args: Its main input, if it is not among the others.
        **kwargs: Keyword arguments.

    Returns:
        The model's output.
    """
    inputs = dict(kwargs)
    if not getattr(model.config, "is_encoder_decoder", False):
        inputs.pop("labels", None)
    inputs.update(zip((model.main_input_name,), args, strict=False))
    if getattr(model.config.get_text_config(), "use_cache", None):
        inputs["use_cache"] = False
    return model(**inputs)
