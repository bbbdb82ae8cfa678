"""A pretrained model converted, measured and distilled: what ``performers convert`` does."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from performers.app.conversion import ConversionOptions
from performers.convert.conversion import Conversion
from performers.convert.distillation.batches import Collator
from performers.convert.distillation.pretrained import LoadedModel, load_model
from performers.convert.distillation.quality import Quality, kind_of, measure_quality
from performers.convert.distillation.results import (
    BASELINE,
    FINE_TUNED,
    ORIGINAL,
    ZERO_SHOT,
    ConversionRecord,
)
from performers.convert.distillation.texts import Example, TextSplits, split_text
from performers.convert.distillation.training import check_adapters, distill
from performers.convert.interface.positions import extend_positions_, learned_positions
from performers.convert.record import read_record
from performers.convert.saving import load_performer
from performers.convert.to_performer import to_performer
from performers.models.manifest import save_model_folder

__all__ = ["Progress", "run_conversion"]

Progress = Callable[[str, int, int, Mapping[str, float]], None]

_CHECKPOINTS = "training"
_LENGTHS = {"causal": 1024, "masked": 512, "encoder": 512}
_SINKS = {"causal": 4, "masked": 0, "encoder": 0}
_LOSSES = {"causal": "logits", "masked": "logits", "encoder": "embedding"}
_TRANSFER_STEPS = 100
# Logits of a batch that is measured, at most, and its rows.
_LOGITS, _ROWS = 1 << 26, 8


def run_conversion(
    options: ConversionOptions,
    folder: Path,
    record: ConversionRecord,
    *,
    resume: Callable[[ConversionRecord], None] = lambda record: None,
    progress: Progress = lambda name, done, total, log: None,
) -> tuple[LoadedModel, Any]:
    """Convert a model, distil it, and measure it before and after on text that it has not seen.

    The model goes to ``folder``, which exists, and the checkpoints meanwhile. ``record`` is filled
    as the run goes; what it has already is not measured again. ``resume`` is called once the
    record has the options of the run, to take over those of an earlier one; ``progress`` with a
    piece of work, how much of how much is done, and figures. A signal raises KeyboardInterrupt
    after a checkpoint. Returns the original and the converted model.
    """
    with _quiet():
        loaded = load_model(options.model, head=None)
        if read_record(loaded.model) is not None:
            raise ValueError(
                f"{options.model} holds a converted model: pass its original, or train it further "
                "with performers.convert.distill"
            )
        work = _Work(options, loaded, folder, record, progress)
        record.options, record.model = work.options_in_full(), work.description()
        resume(record)
        return loaded, work.run()


class _Work:
    """The stages of a run."""

    def __init__(
        self,
        options: ConversionOptions,
        loaded: LoadedModel,
        folder: Path,
        record: ConversionRecord,
        progress: Progress,
    ) -> None:
        self.options, self.folder = options, folder
        self.record, self.progress = record, progress
        self.original, self.tokenizer = loaded.model, loaded.tokenizer
        if self.tokenizer is None:
            raise ValueError(f"model {options.model} has no tokenizer files")
        if options.max_positions is not None:
            extend_positions_(self.original, options.max_positions)
        self.kind = kind_of(self.original)
        if options.lora_rank is not None:
            check_adapters()
        if options.listed_keys and (self.kind == "causal" or self._is_ours()):
            raise ValueError(
                f"listed_keys={options.listed_keys} is for encoders among transformers models, and "
                f"{options.model} is none; leave it out, and give a larger window"
            )
        self.length = self._length()
        self.sinks = _SINKS[self.kind] if options.sinks is None else options.sinks
        self.collator = Collator(
            pad_token_id=self.tokenizer.pad_token_id or 0,
            mask_token_id=self.tokenizer.mask_token_id if self.kind == "masked" else None,
            special_token_ids=tuple(self.tokenizer.all_special_ids),
            causal_labels=self.kind == "causal" and options.loss == "task",
        )
        self.texts: TextSplits = split_text(
            self.tokenizer,
            options.data,
            self.length,
            calibration=options.calibration,
            test=options.test,
            seed=options.seed,
        )

    def options_in_full(self) -> dict[str, Any]:
        """The options as plain values, none of them open."""
        layers = self.options.layers
        return asdict(self.options) | {
            "sinks": self.sinks,
            "length": self.length,
            "layers": None if layers is None else list(layers),
            "transfer_steps": self._transfer_steps(),
            "loss": self._loss(),
            "data_sha256": _digest(Path(self.options.data)),
        }

    def description(self) -> dict[str, Any]:
        """The model in numbers."""
        return {
            "class": type(self.original).__name__,
            "kind": self.kind,
            "parameters": sum(x.numel() for x in self.original.parameters()),
            "tested_examples": len(self.texts.test),
        }

    def run(self) -> Any:
        """All stages; returns the converted model."""
        self._measure(ORIGINAL, lambda: self.original)
        self._measure(BASELINE, self._baseline)
        if self.record.is_saved:
            return load_performer(self.folder)
        student = self._student()
        self._measure(ZERO_SHOT, lambda: student)
        if self.options.steps or self._transfer_steps():
            self._distil(student)
            self._measure(FINE_TUNED, lambda: student)
        save_model_folder(self.folder, student, self.tokenizer)
        self.record.is_saved = True
        self.record.saved(self.record)
        # Checkpoints are three times the model's size, and nothing goes on from them now.
        shutil.rmtree(self.folder / _CHECKPOINTS, ignore_errors=True)
        return student

    def _length(self) -> int:
        limit = learned_positions(self.original)
        wanted = self.options.length
        if wanted is None:
            return min(_LENGTHS[self.kind], limit or _LENGTHS[self.kind])
        if limit is not None and wanted > limit:
            raise ValueError(
                f"length must be at most {limit}, the positions that {self.options.model} has, "
                f"got {wanted}; max_positions gives it more"
            )
        return wanted

    def _is_ours(self) -> bool:
        return getattr(self.original.config, "model_type", None) == "performer"

    def _transfer_steps(self) -> int:
        if self.options.transfer_steps is not None:
            return self.options.transfer_steps
        return 0 if self._is_ours() else _TRANSFER_STEPS

    def _loss(self) -> str:
        return _LOSSES[self.kind] if self.options.loss is None else self.options.loss

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.options.seed)

    def _baseline(self) -> Any:
        return to_performer(
            copy.deepcopy(self.original),
            num_features=self.options.num_features,
            layers=self.options.layers,
            generator=self._generator(),
        )

    def _student(self) -> Any:
        options = self.options
        model = copy.deepcopy(self.original)
        settings = Conversion(estimator=options.estimator, listed_keys=options.listed_keys)
        return to_performer(
            model,
            num_features=options.num_features,
            estimator=options.estimator,
            window=options.window,
            sinks=self.sinks,
            listed_keys=options.listed_keys,
            layers=options.layers,
            calibration=(
                self._batches(self.texts.calibration, "calibrating")
                if settings.needs_samples
                else None
            ),
            generator=self._generator(),
        )

    def _distil(self, student: Any) -> None:
        options, transfer = self.options, self._transfer_steps()
        every = options.eval_steps or max(1, -(-max(options.steps, transfer) // 5))
        result = distill(
            student,
            self.original,
            self.texts.train,
            transfer_steps=transfer,
            steps=options.steps,
            batch_size=options.batch_size,
            accumulation=options.accumulation,
            transfer_learning_rate=options.transfer_learning_rate,
            learning_rate=options.learning_rate,
            loss=self._loss(),
            hidden_weight=options.hidden_weight,
            lora_rank=options.lora_rank,
            redraw_steps=options.redraw_steps,
            collator=self.collator,
            output_dir=self.folder / _CHECKPOINTS,
            save_steps=options.save_steps,
            eval_steps=every,
            evaluate=lambda model: self._quality(model, "measuring meanwhile").figures(),
            resume=(self.folder / _CHECKPOINTS).is_dir(),
            seed=options.seed,
            progress=lambda stage, *state: self.progress(f"training, {stage}", *state),
        )
        self.record.training = {
            "history": result.history,
            "tokens": result.tokens,
            "seconds": result.seconds,
        }
        self.record.saved(self.record)
        if not result.finished:
            raise KeyboardInterrupt
        if not all(bool(torch.isfinite(x).all()) for x in student.parameters()):
            raise ValueError(
                "learning_rate is too high: the training diverged to weights that are not finite; "
                "lower it and give another folder"
            )

    def _measure(self, name: str, make: Callable[[], Any]) -> None:
        """Add a row to the record, if it is not there."""
        if self.record.row(name) is not None:
            return
        model = make()
        started = time.monotonic()
        quality = self._quality(model, f"measuring, {name}")
        row = {"model": name, "tokens": quality.tokens, **quality.figures()}
        self.record.quality.append({**row, "seconds": time.monotonic() - started})
        self.record.saved(self.record)
        if model is not self.original:
            gc.collect()

    def _quality(self, model: Any, name: str) -> Quality:
        return measure_quality(
            model,
            self.original,
            self._batches(self.texts.test, name),
            self.kind,
            self.tokenizer,
            seed=self.options.seed,
        )

    def _batches(self, examples: list[Example], name: str) -> Iterator[dict[str, Tensor]]:
        """Padded batches in which nothing is hidden."""
        vocabulary = self.original.get_input_embeddings().num_embeddings
        rows = max(1, min(_ROWS, _LOGITS // (self.length * vocabulary)))
        collate = Collator(pad_token_id=self.collator.pad_token_id)
        for first in range(0, len(examples), rows):
            yield collate(examples[first : first + rows])
            self.progress(name, min(first + rows, len(examples)), len(examples), {})


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of saving, and without word of a dropout that no run here uses."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the dropout of attention weights")
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
