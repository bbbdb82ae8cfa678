"""The error at the end of a pretrained model whose attention is replaced in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from performers.benchmark.accuracy_approximations import (
    fitted_attention,
    model_approximations,
    setting_columns,
    setting_name,
)
from performers.benchmark.accuracy_passages import Pretrained
from performers.benchmark.groups import MEASURED, verdict
from performers.benchmark.heads import capture_heads
from performers.benchmark.machine import describe
from performers.benchmark.propagation import propagate
from performers.benchmark.results import Results, Row
from performers.benchmark.threads import threads_of_torch
from performers.benchmark.timing import CONTESTANT_ERRORS
from performers.nn import Approximation
from performers.planning.fits import Fits

GROUP_KEYS, MEMBER_KEYS = ("num_features", "setting"), ("layer",)
FINAL = "final"
"""In the column of the layer: what the model ends with."""


def propagation_results(pretrained: Pretrained) -> Results:
    """The empty results of a run, to be filled by ``run_propagation``."""
    settings = pretrained.settings
    threads = settings.threads or torch.get_num_threads()
    return Results("accuracy model", GROUP_KEYS, MEMBER_KEYS, asdict(settings), describe(threads))


def run_propagation(
    pretrained: Pretrained,
    results: Results,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Replace the attention of all layers; results may hold some approximations already.

    Every layer is fitted to what it receives in the unchanged model.

    Args:
        pretrained: The model, the passages and the settings.
        results: Of ``propagation_results``.
        progress: Called with how many approximations of how many are done.

    Raises:
        ValueError: The model's attention cannot be captured.
    """
    settings = pretrained.settings
    approximations = model_approximations(pretrained.approximation)
    with threads_of_torch(settings.threads):
        fits = {
            sample.layer: Fits(sample, settings.seed + sample.layer)
            for sample in capture_heads(pretrained.loaded, pretrained.calibration)
        }
        for number, approximation in enumerate(approximations):
            group = (approximation.num_features, setting_name(approximation))
            if not results.has_group(group, [(FINAL,)]):
                results.put_group(group, _rows(pretrained, fits, approximation))
            progress(number + 1, len(approximations))


def _rows(pretrained: Pretrained, fits: dict[int, Fits], approximation: Approximation) -> list[Row]:
    """A row for each layer, and one for the end."""
    columns = setting_columns(approximation)
    settings = pretrained.settings
    try:
        attention = _by_layer(fits, approximation, settings.backend)
        found = propagate(pretrained.loaded, pretrained.test, attention, seed=settings.seed)
    except CONTESTANT_ERRORS as error:
        status, reason = verdict(error, ours=True)
        return [{**columns, "layer": FINAL, "status": status, "reason": reason}]
    columns |= {"status": MEASURED, "reason": None}
    rows = [{**columns, "layer": entry.layer, "error": entry.error} for entry in found.layers]
    final = {
        **columns,
        "layer": FINAL,
        "error": found.final,
        "cosine": found.cosine,
        "loss": found.loss,
        "replaced_loss": found.replaced_loss,
        "perplexity": found.perplexity,
        "replaced_perplexity": found.replaced_perplexity,
        "predicted": found.predicted,
    }
    return [*rows, final]


def _by_layer(
    fits: dict[int, Fits], approximation: Approximation, backend: str | None
) -> Callable[..., Tensor]:
    """An attention that does in each layer what was fitted to it."""
    functions = {
        layer: fitted_attention(fit, approximation, fit.samples.query.shape[1], backend)
        for layer, fit in fits.items()
    }

    def attention(layer: int, *tensors: Tensor, **options: Any) -> Tensor:
        return functions[layer](layer, *tensors, **options)

    return attention
