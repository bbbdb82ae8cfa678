"""Errors and times on the heads of a pretrained model, and errors at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from performers import favor_attention, plan
from performers.app.progress import Progress
from performers.benchmark.case import MEASURED, Case, Group, Ratio, Row, add_ratios, select
from performers.benchmark.gate import (
    CASE_ERRORS,
    CHECKED_LENGTH,
    Gate,
    WrongResultError,
    check_finite,
    judge,
)
from performers.benchmark.measure import Results, measure_group, verdict
from performers.benchmark.timing import threads_of_torch
from performers.convert.distillation.pretrained import LoadedModel, load_model
from performers.convert.interface.positions import learned_positions
from performers.nn import Approximation
from performers.planning.exact import relative_error
from performers.planning.fits import Fits
from performers.planning.planner import pareto_front
from performers.planning.samples import Samples
from studies.accuracy.approximations import (
    SDPA,
    fitted_attention,
    head_approximations,
    model_approximations,
    setting_columns,
)
from studies.accuracy.capture import HeadSample, capture_heads, exact_attention, propagate
from studies.accuracy.options import PlanOptions, PretrainedOptions
from studies.passages import text_windows

MEAN, FINAL = "mean", "final"
"""In the column of the layer: the mean of the errors over layers with the time of a call, and the
hidden states that the model ends with."""

# Layers from which not all are taken by default, and the step.
_MANY_LAYERS, _STEP = 8, 5
# Errors allowed of a backend against the reference one. Long queries and keys cost digits, and
# normalisers of either sign, which can come close to zero, cost more.
_TOLERANCE, _SIGNED_TOLERANCE = 1e-3, 0.1
_QUADRATIC = "computed with a quadratic mask, for its error and not its time"


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model with passages to fit to, and others to measure on.

    Attributes:
        options: Options of the run.
        loaded: The model, with its language-modelling head where it has one.
        calibration: Token ids of the passages to fit to, (passages, length).
        test: Those of the passages to measure on.
    """

    options: PretrainedOptions
    loaded: LoadedModel
    calibration: Tensor
    test: Tensor

    @property
    def approximation(self) -> Approximation:
        """All exact terms of the options; sinks are for causal models."""
        options = self.options
        return Approximation(
            options.num_features,
            window=options.window,
            sinks=options.sinks if self.loaded.is_causal else 0,
            listed_keys=options.keys,
        )

    def chosen_layers(self, there: list[int]) -> list[int]:
        """The layers whose heads are measured, of those of the model."""
        wanted = self.options.layers
        if not wanted:
            return there if len(there) <= _MANY_LAYERS else sorted({*there[::_STEP], there[-1]})
        return sorted(set(wanted))

    def fit(self) -> dict[int, Fits]:
        """Fits of each layer to its inputs in the unchanged model."""
        samples = capture_heads(self.loaded, self.calibration)
        return {x.layer: Fits(x, self.options.seed + x.layer) for x in samples}


def read_pretrained(options: PretrainedOptions) -> Pretrained:
    """Load the model and cut the texts into passages.

    Raises:
        FileNotFoundError: The model or a text is not there.
        ImportError: The model is a GGUF file, and the package gguf is not installed.
        ValueError: The model cannot be read, or a text is too short or does not suit it.
    """
    loaded = load_model(options.model)
    limit = learned_positions(loaded.model)
    if limit is not None and options.length > limit:
        raise ValueError(
            f"length must be at most {limit}, the positions that {options.model} has, got "
            f"{options.length}"
        )
    if loaded.tokenizer is None:
        raise ValueError(f"model {options.model} has no tokenizer files")
    fitted, length = options.calibration_passages, options.length
    source = options.calibration or options.text
    skip = fitted if options.calibration is None else 0
    calibration = text_windows(loaded.tokenizer, source, length, fitted)
    test = text_windows(loaded.tokenizer, options.text, length, options.passages, skip=skip)
    return Pretrained(options, loaded, calibration, test)


def run_heads(pretrained: Pretrained, results: Results, progress: Progress) -> None:
    """Measure errors, layer by layer, then times on one layer in turns.

    Results may hold some layers already; times are then taken again.
    """
    options = pretrained.options
    approximations = head_approximations(pretrained.approximation, options.feature_counts)
    with threads_of_torch(options.threads) as threads:
        fits = pretrained.fit()
        layers = pretrained.chosen_layers(list(fits))
        samples = capture_heads(pretrained.loaded, pretrained.test, layers=layers)
        tests = {sample.layer: sample for sample in samples}
        fits = {layer: fits[layer] for layer in layers}
        for number, layer in enumerate(layers):
            if not results.holds({"layer": layer}, map(setting_columns, approximations)):
                rows = [
                    _layer_row(fits[layer], tests[layer], x, options.backend)
                    for x in approximations
                ]
                results.put({"layer": layer}, rows)
            progress(number + 1, len(layers) + 1)
        middle = layers[len(layers) // 2]
        sample = tests[middle].part(slice(1))
        rows = _mean_rows(results, approximations, fits[middle], sample, options, threads)
        results.put({"layer": MEAN}, rows)
        progress(len(layers) + 1, len(layers) + 1)


def _layer_row(
    fits: Fits, test: HeadSample, approximation: Approximation, backend: str | None
) -> Row:
    """The error of an approximation on one layer, over all passages."""
    row = {"layer": test.layer, **setting_columns(approximation)}
    row |= {"status": MEASURED, "reason": None, "error": None}
    try:
        if approximation.num_features:
            _check(fits, test, approximation, backend)
        output = fitted_attention(fits, approximation, backend)(test)
        check_finite("output", output)
        row["error"] = float(relative_error(output, exact_attention(test)))
    except CASE_ERRORS as error:
        row["status"], row["reason"] = verdict(error, ours=True)
    return row


def _check(fits: Fits, test: HeadSample, approximation: Approximation, backend: str | None) -> None:
    """Compare the backend with the reference one on a short piece."""
    piece = test.part(slice(1), slice(CHECKED_LENGTH), slice(CHECKED_LENGTH))
    output, expected = (
        fitted_attention(fits, approximation, name)(piece) for name in (backend, "reference")
    )
    signed = approximation.estimator == "trigonometric"
    judge("output", output, expected, _SIGNED_TOLERANCE if signed else _TOLERANCE)


def _mean_rows(
    results: Results,
    approximations: tuple[Approximation, ...],
    fits: Fits,
    sample: Samples,
    options: PretrainedOptions,
    threads: int,
) -> list[Row]:
    """Mean errors of all approximations, with the times of a call on one passage of one layer."""
    cases, errors = [], []
    for approximation in approximations:
        columns = setting_columns(approximation)
        rows = [row for row in select(results.rows, columns) if row["layer"] != MEAN]
        found = [row["error"] for row in rows if row["status"] == MEASURED]
        errors.append(found if len(found) == len(rows) else [])

        def prepare(approximation: Approximation = approximation) -> Callable[[], Tensor]:
            return partial(fitted_attention(fits, approximation, options.backend), sample)

        gate = None if errors[-1] else Gate(_fail)
        skip = None if approximation.num_features else _QUADRATIC
        cases.append(Case(columns, prepare, gate=gate, ours=True, skip=skip))
    columns = {"setting": SDPA, "num_features": 0}
    cases.append(Case(columns, lambda: partial(exact_attention, sample)))
    errors.append([0.0])
    group = Group({"layer": MEAN}, cases)
    rows = measure_group(group, options, threads=threads, seed=options.seed)
    for row, found in zip(rows, errors, strict=True):
        if row["reason"] == _QUADRATIC:
            # Its error is what it is here for.
            row["status"] = MEASURED
        row["error"] = sum(found) / len(found) if found else None
        row["error_low"], row["error_high"] = min(found, default=None), max(found, default=None)
    add_ratios(rows, [Ratio("sdpa_ratio", lambda row: row["setting"] == SDPA, ("layer",))])
    timed = [row for row in rows if row["seconds"] is not None and row["error"] is not None]
    front = pareto_front(timed, lambda row: (row["seconds"], row["error"]))
    for row in timed:
        row["front"] = row in front
    return rows


def _fail() -> None:
    raise WrongResultError("failed on a layer")


def run_models(pretrained: Pretrained, results: Results, progress: Progress) -> None:
    """Replace the attention of all layers; results may hold some approximations already."""
    approximations = model_approximations(pretrained.approximation)
    with threads_of_torch(pretrained.options.threads):
        fits = pretrained.fit()
        for number, approximation in enumerate(approximations):
            key = setting_columns(approximation)
            if not results.holds(key, [{"layer": FINAL}]):
                results.put(key, _model_rows(pretrained, fits, approximation))
            progress(number + 1, len(approximations))


def _model_rows(
    pretrained: Pretrained, fits: dict[int, Fits], approximation: Approximation
) -> list[Row]:
    """A row for each layer, and one for the end."""
    columns, options = setting_columns(approximation), pretrained.options
    try:
        functions = {
            layer: fitted_attention(fit, approximation, options.backend)
            for layer, fit in fits.items()
        }
        found = propagate(
            pretrained.loaded,
            pretrained.test,
            lambda sample: functions[sample.layer](sample),
            seed=options.seed,
        )
    except CASE_ERRORS as error:
        status, reason = verdict(error, ours=True)
        return [{**columns, "layer": FINAL, "status": status, "reason": reason}]
    columns |= {"status": MEASURED, "reason": None}
    rows = [{**columns, "layer": layer, "error": x} for layer, x in enumerate(found.errors)]
    final = {
        **columns,
        "layer": FINAL,
        "error": found.errors[-1],
        "cosine": found.cosine,
        "perplexity": found.original and found.original.perplexity,
        "replaced_perplexity": found.replaced and found.replaced.perplexity,
        "predicted": found.original and found.original.tokens,
    }
    return [*rows, final]


def run_plan(pretrained: Pretrained, results: Results, progress: Progress) -> None:
    """Plan each layer on the passages to fit to; measure what is recommended on the others."""
    options = pretrained.options
    assert isinstance(options, PlanOptions)
    with threads_of_torch(options.threads):
        fitted = {x.layer: x for x in capture_heads(pretrained.loaded, pretrained.calibration)}
        layers = pretrained.chosen_layers(list(fitted))
        tests = capture_heads(pretrained.loaded, pretrained.test, layers=layers)
        for number, test in enumerate(tests):
            if not results.holds({"layer": test.layer}, [{}]):
                sample = fitted[test.layer]
                found = plan(
                    sample.query,
                    sample.key,
                    sample.value,
                    **sample.options,
                    target_error=options.target_error,
                    seed=options.seed,
                    backend=options.backend,
                    show=False,
                )
                features, arguments = found.build()
                with torch.no_grad():
                    tensors = (test.query, test.key, test.value)
                    arguments["key_mask"] = test.key_mask
                    output = favor_attention(*tensors, features, **arguments)
                row = {"layer": test.layer, **setting_columns(found.recommended)}
                row |= {"status": MEASURED, "reason": None, "promised": found.recommended.error}
                row["error"] = float(relative_error(output, exact_attention(test)))
                results.put({"layer": test.layer}, [row])
            progress(number + 1, len(tests))
