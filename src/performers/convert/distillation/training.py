"""A little training that brings a converted model back to the quality of its original."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

from performers.convert.conversion import FAVOR
from performers.convert.distillation.batches import Collator, Stream
from performers.convert.distillation.stages import Distillation, DistillationRun
from performers.convert.distillation.trainers import LOSSES, DistillationTrainer, TransferTrainer
from performers.convert.record import read_record, write_record
from performers.models.manifest import find_damage, write_manifest
from performers.nn import FavorAttention

__all__ = ["Distillation", "check_adapters", "distill"]

_TRANSFERRED, _PARAMETERS = "transferred", "parameters.safetensors"


def distill(
    student: Any,
    teacher: Any,
    data: Dataset[Any] | Iterable[Any],
    *,
    transfer_steps: int = 100,
    steps: int = 200,
    batch_size: int = 4,
    accumulation: int = 1,
    transfer_learning_rate: float = 1e-2,
    learning_rate: float = 5e-5,
    loss: str | None = None,
    hidden_weight: float = 1.0,
    lora_rank: int | None = None,
    redraw_steps: int | None = None,
    collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    output_dir: str | Path | None = None,
    save_steps: int = 50,
    log_steps: int = 10,
    eval_steps: int | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int, dict[str, float]], None] | None = None,
    options: dict[str, Any] | None = None,
) -> Distillation:
    """Train a converted model to do what the original did, in place.

    First attention transfer (``transfer_steps``): each layer's features become parameters
    (`LearnedFeatures`, their biases weigh the far field against the window) and learn to reproduce
    the layer's exact attention, everything else frozen. Then the model as a whole (``steps``), by
    the original's outputs or by the task's own loss; all weights, or low-rank adapters on the
    linear layers with ``lora_rank``, which are merged at the end. Runs on ``transformers.Trainer``,
    hence under accelerate and torchrun. Source: Zhang et al. 2024 (arXiv 2410.10254).

    Args:
        student: A model that `to_performer` converted.
        teacher: The original model; None if only transfer or the task's loss is asked for.
        data: Examples, mappings with ``input_ids`` (and ``attention_mask``) or other inputs of the
            model: a list or map-style dataset, which is shuffled, or an iterable, whose order is
            kept. One that ends is begun again.
        transfer_steps: Steps of attention transfer; 0: none. Needs a transformers model.
        steps: Steps of the whole model; 0: none.
        batch_size: Examples in a batch, on each device.
        accumulation: Batches in a step.
        transfer_learning_rate: Of the features' parameters (Adam, to zero along a cosine).
        learning_rate: Of the model's weights (AdamW, likewise, with a warm-up of 5%).
        loss: ``"logits"`` (default for models that have logits), ``"hidden"`` (default for the
            others), ``"embedding"`` or ``"task"``; see `DistillationTrainer`.
        hidden_weight: Weight of the hidden states' error beside that of logits or embeddings.
        lora_rank: Rank of the adapters; None: all weights are trained. Needs peft.
        redraw_steps: Draw features anew every so many steps, those that are not trained.
        collator: From a list of examples to a batch; None: padding, and hidden tokens for masked
            language models whose tokenizer's ids are in ``student.config``.
        output_dir: Where checkpoints and the history (``distillation.json``) go; None: nowhere.
        save_steps: Steps between checkpoints.
        log_steps: Steps between log entries.
        eval_steps: Steps between calls of ``evaluate``; None: only at the end of a stage.
        evaluate: Called with the model in evaluation mode; returns figures for the history.
        resume: Continue from the last checkpoint in ``output_dir``.
        seed: Of the order of the data and of all draws.
        progress: Called with the stage, the step, the steps in all and the latest log entry.
        options: More arguments for ``transformers.TrainingArguments``.

    Returns:
        What was done; the student is changed in place, and in evaluation mode.

    Raises:
        ValueError: An argument is out of range, or the student was not converted.
    """
    _check(student, teacher, transfer_steps, steps, loss, lora_rank, resume, output_dir)
    _check_size(data, batch_size)
    kind = loss or ("logits" if _has_logits(student) else "hidden")
    if lora_rank is not None:
        check_adapters()
    run = DistillationRun(
        student=student,
        # Whatever can be indexed is shuffled; the rest comes as it comes.
        data=data if hasattr(data, "__getitem__") or isinstance(data, Dataset) else Stream(data),
        collator=collator or default_collator(student, kind),
        output=None if output_dir is None else Path(output_dir),
        batch_size=batch_size,
        accumulation=accumulation,
        save_steps=save_steps,
        log_steps=log_steps,
        eval_steps=eval_steps,
        evaluate=evaluate,
        resume=resume,
        seed=seed,
        progress=progress,
        options=options or {},
    )
    if resume:
        run.read()
    # The original has no dropout when it is imitated.
    undropped = contextlib.nullcontext() if kind == "task" else _without_dropout(student)
    if transfer_steps:
        with _without_dropout(student), _without_checkpointing(student):
            _transfer(run, transfer_steps, transfer_learning_rate)
    if steps and run.result.finished:
        with undropped, _adapted(student, lora_rank) as model:
            run.train(
                DistillationTrainer,
                model,
                "model",
                steps,
                learning_rate,
                redraw_steps=redraw_steps,
                teacher=teacher,
                loss=kind,
                hidden_weight=hidden_weight,
            )
    run.result.seconds = run.earlier + time.monotonic() - run.started
    student.eval()
    return run.result


def default_collator(model: Any, loss: str = "logits") -> Collator:
    """How examples become batches when nothing else is said."""
    config = model.config
    pad = getattr(config, "pad_token_id", None)
    mask = getattr(config, "mask_token_id", None)
    masked = "ForMaskedLM" in type(model).__name__ and mask is not None
    special = {pad, mask, *(getattr(config, f"{x}_token_id", None) for x in ("cls", "sep", "bos"))}
    special |= {getattr(config, "eos_token_id", None)}
    return Collator(
        pad_token_id=0 if pad is None else pad,
        mask_token_id=mask if masked else None,
        special_token_ids=tuple(sorted(x for x in special if isinstance(x, int))),
        causal_labels=loss == "task" and not masked,
    )


def _transfer(run: DistillationRun, steps: int, learning_rate: float) -> None:
    """Attention transfer, which a finished one in ``output`` stands for when resuming."""
    student = run.student
    blocks = {
        module: block
        for module in student.modules()
        if isinstance(block := getattr(module, FAVOR, None), FavorAttention)
    }
    for block in blocks.values():
        block.learn_(block.feature_map.num_heads or 1)
    conversion = read_record(student)
    assert conversion is not None
    write_record(student, replace(conversion, learned=True))
    done = None if run.output is None else run.output / _TRANSFERRED
    if run.resume and done is not None and done.is_dir():
        damage = find_damage(done)
        if damage is not None:
            raise ValueError(
                f"{done}: {damage}; restore it from a copy, or delete {done} to resume the "
                "transfer from its last checkpoint"
            )
        _read_parameters(blocks, done)
        return
    frozen = [parameter for parameter in student.parameters() if parameter.requires_grad]
    learned = [parameter for block in blocks.values() for parameter in block.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for parameter in learned:
        parameter.requires_grad_(True)
    try:
        # Gradients stay within a layer: there are no activations to compute again.
        names = {"gradient_checkpointing", "activation_checkpointing"}
        kept = {name: value for name, value in run.options.items() if name not in names}
        stage = replace(run, options=kept)
        stage.train(TransferTrainer, student, "transfer", steps, learning_rate, blocks=blocks)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    if done is not None and run.result.finished and int(os.environ.get("RANK", "0")) == 0:
        _save_parameters(blocks, done)


def _save_parameters(blocks: dict[nn.Module, FavorAttention], folder: Path) -> None:
    """Save the features' parameters with a manifest, whole or not at all."""
    staging = folder.with_name(f".{folder.name}")
    for earlier in (staging, folder):
        shutil.rmtree(earlier, ignore_errors=True)
    staging.mkdir()
    parameters = nn.ModuleList(blocks.values()).named_parameters()
    save_file({k: x.detach().cpu().contiguous() for k, x in parameters}, staging / _PARAMETERS)
    write_manifest(staging)
    staging.rename(folder)


def _read_parameters(blocks: dict[nn.Module, FavorAttention], folder: Path) -> None:
    tensors = load_file(folder / _PARAMETERS)
    with torch.no_grad():
        for name, parameter in nn.ModuleList(blocks.values()).named_parameters():
            parameter.copy_(tensors[name])


def _without_dropout(model: nn.Module) -> AbstractContextManager[None]:
    return _changed([x for x in model.modules() if isinstance(x, nn.Dropout)], "p", 0.0)


def _without_checkpointing(model: nn.Module) -> AbstractContextManager[None]:
    """Gradient checkpointing switched off in all layers of a model."""
    layers = [x for x in model.modules() if getattr(x, "gradient_checkpointing", False)]
    return _changed(layers, "gradient_checkpointing", False)


@contextlib.contextmanager
def _changed(modules: list[Any], name: str, value: Any) -> Iterator[None]:
    """An attribute of some modules changed while a context lasts."""
    before = [getattr(module, name) for module in modules]
    for module in modules:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            setattr(module, name, old)


@contextlib.contextmanager
def _adapted(student: Any, rank: int | None) -> Iterator[Any]:
    """The model to train: the student, or the student with adapters, merged afterwards."""
    if rank is None:
        yield student
        return
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    adapted = peft.get_peft_model(student, config)
    try:
        yield adapted
    finally:
        adapted.merge_and_unload()
        for parameter in trainable:
            parameter.requires_grad_(True)


def _has_logits(model: Any) -> bool:
    name = type(model).__name__
    return "ForMaskedLM" in name or "ForCausalLM" in name or "LMHead" in name


def check_adapters() -> None:
    """Refuse to train adapters without the package that makes them."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            "lora_rank needs peft: pip install 'performers[convert]', or train all weights with "
            "lora_rank=None"
        )


def _check_size(data: Any, batch_size: int) -> None:
    size = len(data) if hasattr(data, "__len__") else None
    if size is not None and size < batch_size:
        raise ValueError(
            f"data has {size} examples, fewer than a batch (batch_size={batch_size}): pass more, "
            f"or batch_size={max(1, size)}"
        )


def _check(
    student: Any,
    teacher: Any,
    transfer_steps: int,
    steps: int,
    loss: str | None,
    lora_rank: int | None,
    resume: bool,
    output_dir: str | Path | None,
) -> None:
    if transfer_steps < 0 or steps < 0 or not transfer_steps + steps:
        raise ValueError(
            "transfer_steps and steps must be at least 0 and not both 0, got "
            f"{transfer_steps} and {steps}"
        )
    if loss is not None and loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if teacher is None and steps and loss != "task":
        raise ValueError(
            "teacher is None: pass the original model to learn from, or loss='task' and examples "
            "with labels"
        )
    if teacher is student:
        raise ValueError(
            "teacher and student are the same object, and to_performer works in place: load the "
            "original once more, or copy.deepcopy it before converting"
        )
    if lora_rank is not None and lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1 or None, got {lora_rank}")
    if resume and output_dir is None:
        raise ValueError("resume needs output_dir, the folder of the run to continue")
    if transfer_steps and read_record(student) is None:
        raise ValueError(
            f"{type(student).__name__} is no converted transformers model: call to_performer on "
            "it first, or pass transfer_steps=0"
        )
