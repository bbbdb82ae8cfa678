"""Conversion, distillation and measurement of a pretrained model, for ``performers convert``."""

import copy
import gc
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from performers.app.conversion import ConversionOptions
from performers.app.files import sha256
from performers.app.provenance import weights_sha256
from performers.convert.distillation.batches import Collator
from performers.convert.distillation.pretrained import load_model
from performers.convert.distillation.quality import Quality, kind_of, measure_quality
from performers.convert.distillation.results import (
    BASELINE,
    FINE_TUNED,
    ORIGINAL,
    ZERO_SHOT,
    BestState,
    ConversionRecord,
    score,
)
from performers.convert.distillation.texts import Example, split_text
from performers.convert.distillation.training import check_adapters, distill
from performers.convert.hub import is_hub_name, model_folder, read_card
from performers.convert.interface.positions import extend_positions_, learned_positions
from performers.convert.options import Conversion
from performers.convert.record import read_record
from performers.convert.saving import load_performer
from performers.convert.sentences import SentenceFiles
from performers.convert.to_performer import to_performer
from performers.models.manifest import save_model_folder

Progress = Callable[[str, int, int, Mapping[str, float]], None]

_CHECKPOINTS, _BEST = "training", "best.safetensors"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "causal": {"length": 1024, "sinks": 4, "loss": "logits"},
    "masked": {"length": 512, "sinks": 0, "loss": "logits"},
    "encoder": {"length": 512, "sinks": 0, "loss": "embedding"},
}
_TRANSFER_STEPS = 100
# Options of the run that `distill` has under the same name.
_TRAINING = (
    "transfer_steps", "steps", "batch_size", "accumulation", "learning_rate",
    "transfer_learning_rate", "loss", "hidden_weight", "lora_rank", "redraw_steps", "save_steps",
    "seed",
)  # fmt: skip
# Maximum number of logits and rows in a batch of measurements.
_LOGITS, _ROWS = 1 << 26, 8


class ConversionRun:
    """Conversion, distillation and measurement of a model on held-out text.

    Args:
        options: Options of the run; what depends on the model is filled in for the record.
        folder: Gets the new model and, until it is done, the checkpoints.
        record: Gets the options, the description of the model and each result.
        progress: Called with a piece of work, the amounts done and in all, and figures.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: The model, the text or an option cannot be used.
    """

    def __init__(
        self,
        options: ConversionOptions,
        folder: Path,
        record: ConversionRecord,
        progress: Progress,
    ) -> None:
        self.folder, self.record, self.progress = folder, record, progress
        source = model_folder(options.model, "MODEL")
        self.sentences = SentenceFiles.of(source)
        if self.sentences is None:
            loaded = load_model(source)
        else:
            loaded = load_model(self.sentences.transformer, head=False)
        self.original, self.tokenizer = loaded.model, loaded.tokenizer
        self.source = record.source = loaded.path
        if read_record(self.original) is not None:
            raise ValueError(
                f"{options.model} holds a converted model: pass its original, or train it further "
                "with performers.convert.distill"
            )
        if self.tokenizer is None:
            raise ValueError(f"model {options.model} has no tokenizer files")
        trained_positions = learned_positions(self.original)
        # Positions of the model, and the length of its tokenizer, that the options ask for.
        asked = max(options.length or 0, options.max_positions or 0)
        if trained_positions is not None and asked > trained_positions:
            extend_positions_(self.original, asked)
            self.tokenizer.model_max_length = max(asked, self.tokenizer.model_max_length)
        if self.sentences and asked > (self.sentences.config.get("max_seq_length") or asked):
            self.sentences.config["max_seq_length"] = asked
        self.kind = kind_of(self.original)
        if options.lora_rank is not None:
            check_adapters()
        is_ours = getattr(self.original.config, "model_type", None) == "performer"
        if options.listed_keys and (self.kind == "causal" or is_ours):
            raise ValueError(
                f"listed_keys={options.listed_keys} is for encoders among transformers models, and "
                f"{options.model} is none; leave it out, and give a larger window"
            )
        defaults = _DEFAULTS[self.kind] | {"transfer_steps": 0 if is_ours else _TRANSFER_STEPS}
        positions = learned_positions(self.original)
        defaults["length"] = min(defaults["length"], positions or defaults["length"])
        unset = {name: x for name, x in defaults.items() if getattr(options, name) is None}
        self.options = options = replace(options, **unset)
        self.length = options.length or defaults["length"]
        self.collator = Collator(
            pad_token_id=self.tokenizer.pad_token_id or 0,
            mask_token_id=self.tokenizer.mask_token_id if self.kind == "masked" else None,
            special_token_ids=tuple(self.tokenizer.all_special_ids),
            causal_labels=self.kind == "causal" and options.loss == "task",
        )
        self.texts = split_text(
            self.tokenizer,
            options.data,
            self.length,
            calibration=options.calibration,
            test=options.test,
            seed=options.seed,
        )
        record.options = asdict(options) | {
            "layers": None if options.layers is None else list(options.layers),
            "model_sha256": weights_sha256(self.source),
            "data_sha256": sha256(Path(options.data)),
        }
        record.model = {
            "class": type(self.original).__name__,
            "kind": self.kind,
            "parameters": sum(x.numel() for x in self.original.parameters()),
            "tested_examples": len(self.texts.test),
            "trained_positions": trained_positions,
            "positions": positions,
            "is_sentence_model": self.sentences is not None,
            "is_hub_name": is_hub_name(options.model),
            "card": read_card(self.sentences.folder if self.sentences else self.source),
        }

    def run(self) -> Any:
        """Run all stages that the record lacks.

        Returns:
            The converted model: of all states of the training that were measured, the best.

        Raises:
            KeyboardInterrupt: A signal stopped the training, after a checkpoint.
            ValueError: The training diverged.
        """
        self._measure(ORIGINAL, lambda: self.original)
        self._measure(BASELINE, self._convert)
        if self.record.is_saved:
            return load_performer(self.folder)
        student = self._untrained()
        self._measure(ZERO_SHOT, lambda: student)
        if self.options.steps or self.options.transfer_steps:
            student = self._distil(student)
            self._measure(FINE_TUNED, lambda: student)
        parts = [self.tokenizer] if self.sentences is None else [self.tokenizer, self.sentences]
        save_model_folder(self.folder, student, *parts)
        self.record.is_saved = True
        self.record.save()
        # Checkpoints take three times the model's space and are not needed any more.
        shutil.rmtree(self.folder / _CHECKPOINTS, ignore_errors=True)
        return student

    def _untrained(self) -> Any:
        return self._convert(
            estimator=self.options.estimator,
            window=self.options.window,
            sinks=self.options.sinks,
            listed_keys=self.options.listed_keys,
        )

    def _convert(self, **approximation: Any) -> Any:
        samples = None
        if Conversion(**approximation).needs_samples:
            samples = self._batches(self.texts.calibration, "calibrating")
        return to_performer(
            copy.deepcopy(self.original),
            num_features=self.options.num_features,
            layers=self.options.layers,
            calibration=samples,
            generator=torch.Generator().manual_seed(self.options.seed),
            **approximation,
        )

    def _distil(self, student: Any) -> Any:
        """Train the model; returns the best state of those measured, the untrained one included."""
        steps = max(self.options.steps, self.options.transfer_steps or 0)
        best = BestState(self.folder / _CHECKPOINTS / _BEST)

        def evaluate(model: Any) -> dict[str, float]:
            figures = self._quality(model, "measuring meanwhile").figures()
            best.offer(model, figures)
            return figures

        result = distill(
            student,
            self.original,
            self.texts.train,
            collator=self.collator,
            output_dir=self.folder / _CHECKPOINTS,
            eval_steps=self.options.eval_steps or max(1, -(-steps // 5)),
            evaluate=evaluate,
            resume=(self.folder / _CHECKPOINTS).is_dir(),
            progress=lambda stage, *state: self.progress(f"training, {stage}", *state),
            **{name: getattr(self.options, name) for name in _TRAINING},
        )
        training = asdict(result)
        finished = training.pop("finished")
        self.record.training = training
        self.record.save()
        if not finished:
            raise KeyboardInterrupt
        if not all(bool(torch.isfinite(x).all()) for x in student.parameters()):
            raise ValueError(
                "learning_rate is too high: the training diverged to weights that are not finite; "
                "lower it and give another folder"
            )
        measured = [entry for entry in result.history if "loss" not in entry]
        chosen = max(measured, key=score)
        untrained = self.record.row(ZERO_SHOT)
        if untrained is not None and score(untrained) >= score(chosen):
            student, chosen = self._untrained(), {"stage": "untrained", "step": 0}
        elif best.file.is_file():
            student.load_state_dict(load_file(best.file))
        else:
            # A run of a version that kept no best state ends with the last one.
            chosen = measured[-1]
        training["saved"] = {name: chosen[name] for name in ("stage", "step")}
        self.record.save()
        return student

    def _measure(self, name: str, make: Callable[[], Any]) -> None:
        """Add a row to the record unless it has one of that name."""
        if self.record.row(name) is not None:
            return
        model = make()
        started = time.monotonic()
        quality = self._quality(model, f"measuring, {name}")
        row = {"model": name, "tokens": quality.tokens, **quality.figures()}
        self.record.quality.append({**row, "seconds": time.monotonic() - started})
        self.record.save()
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
        """Padded batches without masked tokens."""
        vocabulary = self.original.get_input_embeddings().num_embeddings
        rows = max(1, min(_ROWS, _LOGITS // (self.length * vocabulary)))
        collate = Collator(pad_token_id=self.collator.pad_token_id)
        for first in range(0, len(examples), rows):
            yield collate(examples[first : first + rows])
            self.progress(name, min(first + rows, len(examples)), len(examples), {})
