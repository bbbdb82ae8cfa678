"""Batches of rows through a model, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from performers.app.progress import Progress
from performers.proteins.inputs.families import FamilyRows
from performers.proteins.inputs.packing import LengthBucketedBatchSampler, TokenDataset
from performers.proteins.inputs.relatives import RelativesRows
from performers.proteins.model_folder import check_input_length


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context of a model in evaluation mode and of inference; each module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def run_batches(
    model: PreTrainedModel,
    dataset: TokenDataset | FamilyRows | RelativesRows,
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[tuple[list[int], dict[str, Tensor], Any]]:
    """Run a model on all rows, the longest first.

    `batch_tokens` are those of a batch, padding included; a longer row is a batch of its own.
    `progress` is called with the rows done and the rows in all, after each batch. The options are
    further arguments of the model.

    Yields:
        Indices of a batch's rows, the batch on the model's device, and the model's output.

    Raises:
        UserError: A row is longer than the model can read.
    """
    longest = int(dataset.lengths.max())
    check_input_length(model, longest)
    if model.config.is_decoder:
        options["use_cache"] = False
    done = 0
    for keys in LengthBucketedBatchSampler(
        dataset.lengths, max_tokens=max(batch_tokens, longest), shuffle=False
    ):
        batch = collate([dataset[key] for key in keys])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with evaluation_mode(model):
            output = model(**inputs, **options)
        yield [index for _, index in keys], batch, output
        done += len(keys)
        if progress is not None:
            progress(done, len(dataset))
