"""Training that restores the quality of the original in a converted model."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from performers.app.processes import process_count
from performers.attention.sharding import check_not_sharded
from performers.convert.distillation.batches import Collator, Stream
from performers.convert.distillation.quality import kind_of
from performers.convert.distillation.stages import Distillation, DistillationRun
from performers.convert.distillation.trainers import LOSSES, DistillationTrainer, TransferTrainer
from performers.convert.families.shards import check_layers_run, check_shards
from performers.convert.options import converted_modules
from performers.convert.record import read_record, write_record
from performers.convert.sentences import transformer_of
from performers.training.parallel import mesh_arguments, tied_parameters


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
    sequence_parallel: int = 1,
    fsdp: bool = False,
) -> Distillation:
    """Train a converted model to match its original, in place.

    The first stage is attention transfer (``transfer_steps``): the features of each layer become
    parameters (`LearnedFeatures`, whose biases weigh estimated pairs against exact ones) and learn
    to reproduce the exact attention of the layer, everything else frozen. The second stage trains
    the whole model (``steps``) on the outputs of the original or the loss of the task; all weights,
    or with ``lora_rank`` low-rank adapters on the linear layers, which are merged at the end. Both
    run on ``transformers.Trainer``, hence under accelerate and torchrun. Source: Zhang et al. 2024
    (arXiv 2410.10254).

    Args:
        student: A model that `to_performer` converted; of sentence-transformers, the transformer
            inside is trained.
        teacher: The original model; None if only transfer or the task's loss is wanted.
        data: Examples, mappings with ``input_ids`` (and ``attention_mask``) or other inputs of the
            model: a list or map-style dataset, which is shuffled, or an iterable, whose order is
            kept. It is repeated if it ends.
        transfer_steps: Steps of attention transfer, for transformers models; 0: none.
        steps: Steps of the whole model; 0: none.
        batch_size: Examples per batch and device.
        accumulation: Batches per step.
        transfer_learning_rate: Initial learning rate of the features' parameters (Adam, decaying to
            0 along a cosine).
        learning_rate: Peak learning rate of the model's weights (AdamW, with a warm-up of 5%, then
            likewise).
        loss: ``"logits"`` (default for models that have logits), ``"hidden"`` (default for the
            others), ``"embedding"`` or ``"task"``; see `DistillationTrainer`.
        hidden_weight: Weight of the hidden states' error added to that of logits or embeddings.
        lora_rank: Rank of the adapters; None: all weights are trained. Needs peft.
        redraw_steps: Steps between redraws of features that are not trained; None: never.
        collator: From a list of examples to a batch; None: padding, and masked tokens for masked
            language models with the tokenizer's ids in ``student.config``.
        output_dir: Folder of checkpoints and the history (``distillation.json``); None: neither.
        save_steps: Steps between checkpoints.
        log_steps: Steps between log entries.
        eval_steps: Steps between calls of ``evaluate``; None: only at the end of a stage.
        evaluate: Called with the model in evaluation mode; returns figures for the history.
        resume: Whether to continue from the last checkpoint in ``output_dir``.
        seed: Random seed of the order of the data and of all draws.
        progress: Called with the stage, the step, the steps in all and the latest log entry.
        options: More arguments for ``transformers.TrainingArguments``.
        sequence_parallel: Processes of torchrun that share each row, in consecutive shards; 1: each
            has rows of its own. The teacher runs on whole rows in every process. Losses and weights
            are those of one process on whole rows, to rounding.
        fsdp: Shard weights, gradients and the optimiser's state over all processes (FSDP2), as
            ``sequence_parallel`` does too. The student and the teacher stay whole in each process;
            a copy of the student is sharded.

    Returns:
        The results; the student is in evaluation mode.

    Raises:
        ValueError: An argument is out of range, the student was not converted, or its rows cannot
            be cut.
        UserError: The processes do not begin with one model, or one of them was lost.
    """
    check_not_sharded("distill")
    if (options or {}).keys() & {"parallelism_config", "fsdp", "fsdp_config"}:
        raise ValueError(
            "parallelism_config and fsdp are no options here: pass distill(..., "
            "sequence_parallel=N) or fsdp=True"
        )
    student, teacher = transformer_of(student), transformer_of(teacher)
    if transfer_steps < 0 or steps < 0 or not transfer_steps + steps:
        raise ValueError(
            "transfer_steps and steps must be at least 0 and not both 0, got "
            f"{transfer_steps} and {steps}"
        )
    if lora_rank is not None and lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1 or None, got {lora_rank}")
    if resume and output_dir is None:
        raise ValueError("resume needs output_dir, the folder of the run to continue")
    size = len(data) if isinstance(data, Sized) else batch_size
    if size < batch_size:
        raise ValueError(
            f"data has {size} examples, fewer than a batch (batch_size={batch_size}): pass more, "
            f"or batch_size={max(1, size)}"
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
    if transfer_steps and read_record(student) is None:
        raise ValueError(
            f"{type(student).__name__} is no converted transformers model: call to_performer on "
            "it first, or pass transfer_steps=0"
        )
    if lora_rank is not None:
        check_adapters()
    names = ("ForMaskedLM", "ForCausalLM", "LMHead")
    has_logits = any(name in type(student).__name__ for name in names)
    kind = loss or ("logits" if has_logits else "hidden")
    mesh = _mesh(student, sequence_parallel, fsdp=fsdp)
    if sequence_parallel > 1:
        _check_rows(student, kind, has_logits=has_logits)
    if mesh and not hasattr(data, "__getitem__"):
        raise ValueError(
            "data must be a list or a map-style dataset where processes share rows or weights, so "
            f"that each knows its examples, got {type(data).__name__}: pass list(data)"
        )
    if not (hasattr(data, "__getitem__") or isinstance(data, Dataset)):
        data = Stream(data)
    run = DistillationRun(
        student=student,
        data=data,
        collator=collator or default_collator(student, kind),
        output_dir=None if output_dir is None else Path(output_dir),
        arguments={
            "save_steps": save_steps,
            "logging_steps": log_steps,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "seed": seed,
            # Of all processes, whose other draws differ.
            "data_seed": seed,
            # Several processes without an accelerator would otherwise train apart.
            "use_cpu": torch.accelerator.current_accelerator(check_available=True) is None,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "dataloader_drop_last": not isinstance(data, IterableDataset),
            **mesh,
            **(options or {}),
        },
        eval_steps=eval_steps,
        evaluate=evaluate,
        progress=progress,
        resume=resume,
    )
    if transfer_steps:
        _transfer(run, transfer_steps, transfer_learning_rate)
    if steps and run.result.finished:
        # Dropout belongs to the task alone: the original is imitated without it.
        undropped = contextlib.nullcontext() if kind == "task" else _without_dropout(student)
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
                is_causal=sequence_parallel > 1 and kind_of(student) == "causal",
            )
    run.write()
    student.eval()
    return run.result


def _mesh(student: Any, sequence_parallel: int, *, fsdp: bool) -> dict[str, Any]:
    """Arguments of a trainer that shards a student."""
    if sequence_parallel < 1:
        raise ValueError(f"sequence_parallel must be at least 1, got {sequence_parallel}")
    if sequence_parallel == 1 and not fsdp:
        return {}
    check_layers_run(student)
    try:
        return mesh_arguments(
            process_count(), sequence_parallel=sequence_parallel, blocks=_blocks(student)
        )
    except (RuntimeError, ValueError) as error:
        name = f"sequence_parallel={sequence_parallel}" if sequence_parallel > 1 else "fsdp=True"
        raise ValueError(f"{name} {error}; start the program with torchrun") from error


def _blocks(student: Any) -> tuple[str, ...]:
    """Classes of a student's blocks that FSDP2 can shard each for itself."""
    if getattr(student.config, "reversible", False):
        return ()
    tied, named = tied_parameters(student), set(getattr(student, "_no_split_modules", None) or ())
    found: dict[str, bool] = {}
    for module in student.modules():
        name = type(module).__name__
        if name in named:
            found[name] = found.get(name, True) and tied.isdisjoint(module.parameters())
    return tuple(name for name, is_apart in sorted(found.items()) if is_apart)


def _check_rows(student: Any, loss: str, *, has_logits: bool) -> None:
    """Refuse a student whose rows cannot be cut."""
    check_shards(student)
    if loss in ("logits", "task") and not has_logits:
        raise ValueError(
            f"loss={loss!r} of a {type(student).__name__} needs whole rows: it has no logits for "
            "each token; pass sequence_parallel=1, or loss='hidden'"
        )
    if loss == "task" and getattr(student.config, "output_router_logits", False):
        raise ValueError(
            "loss='task' has a term over all tokens of a row (output_router_logits), which "
            "shards do not have: pass sequence_parallel=1, or switch it off in the configuration"
        )


def check_adapters() -> None:
    """Check that the package of the adapters is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError(
            "lora_rank needs peft: pip install 'performers[convert]', or train all weights with "
            "lora_rank=None"
        )


def default_collator(model: Any, loss: str) -> Collator:
    """Build the collator of a model from the token ids in its configuration."""
    ids = {
        name: getattr(model.config, f"{name}_token_id", None)
        for name in ("pad", "mask", "cls", "sep", "bos", "eos")
    }
    is_masked = "ForMaskedLM" in type(model).__name__ and ids["mask"] is not None
    return Collator(
        pad_token_id=0 if ids["pad"] is None else ids["pad"],
        mask_token_id=ids["mask"] if is_masked else None,
        special_token_ids=tuple(sorted({x for x in ids.values() if isinstance(x, int)})),
        causal_labels=loss == "task" and not is_masked,
    )


def _transfer(run: DistillationRun, steps: int, learning_rate: float) -> None:
    """Run attention transfer, which trains the features alone."""
    student = run.student
    blocks = converted_modules(student).values()
    for block in blocks:
        block.learn_(block.feature_map.num_heads or 1)
    conversion = read_record(student)
    assert conversion is not None
    write_record(student, replace(conversion, learned=True))
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    checkpointed = [x for x in student.modules() if getattr(x, "gradient_checkpointing", False)]
    with (
        _without_dropout(student),
        _changed(checkpointed, "gradient_checkpointing", False),
        _changed(trainable, "requires_grad", False),
    ):
        nn.ModuleList(blocks).requires_grad_(True)
        run.train(TransferTrainer, student, "transfer", steps, learning_rate)


def _without_dropout(model: nn.Module) -> AbstractContextManager[None]:
    return _changed([x for x in model.modules() if isinstance(x, nn.Dropout)], "p", 0.0)


@contextlib.contextmanager
def _changed(objects: list[Any], name: str, value: Any) -> Iterator[None]:
    """Change an attribute of some objects while a context lasts."""
    before = [getattr(x, name) for x in objects]
    for x in objects:
        setattr(x, name, value)
    try:
        yield
    finally:
        for x, old in zip(objects, before, strict=True):
            setattr(x, name, old)


@contextlib.contextmanager
def _adapted(student: Any, rank: int | None) -> Iterator[Any]:
    """Yield the student, or the student with adapters, which are merged afterwards."""
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
