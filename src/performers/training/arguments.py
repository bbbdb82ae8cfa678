"""Settings of transformers' Trainer, and callbacks of trackers, for the options of a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from performers.app.errors import UserError
from performers.app.processes import process_count
from performers.training.environment import available_device
from performers.training.options import TrainingOptions
from performers.training.parallel import mesh_arguments


def training_arguments(folder: Path, options: TrainingOptions) -> TrainingArguments:
    """Settings of the trainer, whose checkpoints are in a folder.

    Raises:
        UserError: The device is not available, or cannot compute in bfloat16.
    """
    use_cpu = _use_cpu(options.device)
    mesh = _mesh_arguments(options) if options.sharded else {}
    tenth = max(1, options.steps // 10)
    warmup = max(1, options.steps // 20)
    try:
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=options.steps,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=warmup if options.warmup_steps is None else options.warmup_steps,
            weight_decay=options.weight_decay,
            adam_beta1=0.9,
            adam_beta2=0.98,
            adam_epsilon=1e-9,
            max_grad_norm=options.max_grad_norm,
            bf16=options.bf16,
            seed=options.seed,
            logging_strategy="steps",
            logging_steps=options.log_steps,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=options.eval_steps or tenth,
            save_strategy="steps",
            save_steps=options.save_steps or tenth,
            save_total_limit=2,
            report_to="none",
            use_cpu=use_cpu,
            ddp_find_unused_parameters=False,
            remove_unused_columns=False,
            disable_tqdm=True,
            # Token budgets give batches of different sizes; accelerate cannot even those out.
            accelerator_config={"even_batches": False},
            dataloader_pin_memory=not use_cpu and torch.cuda.is_available(),
            **mesh,
        )
    except ValueError as error:
        if not options.bf16:
            raise
        raise UserError(
            f"--dtype bfloat16: {' '.join(str(error).split())[:200]}; use --dtype float32"
        ) from error


def tracker_callbacks(trackers: Sequence[str], output: Path) -> list[TrainerCallback]:
    """Callbacks that log to trackers; TensorBoard's files are in ``output/tensorboard``.

    Raises:
        UserError: The package of a tracker is missing.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report-to {name} needs a package: pip install {name}")
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in trackers:
        board = TensorBoardCallback()
        board.logging_dir = str(output / "tensorboard")
        callbacks.append(board)
    if "wandb" in trackers:
        callbacks.append(WandbCallback())
    return callbacks


def _mesh_arguments(options: TrainingOptions) -> dict[str, Any]:
    share = options.sequence_parallel
    flag = f"--sequence-parallel {share}" if share > 1 else "--fsdp"
    try:
        return mesh_arguments(
            process_count(), sequence_parallel=share, blocks=() if options.reversible else None
        )
    except RuntimeError as error:
        raise UserError(f"{flag} {error}; upgrade it, or leave out {flag}") from error
    except ValueError as error:
        raise UserError(
            f"{flag} {error}; start them with torchrun --nproc-per-node {max(2, share)} -m "
            "performers train"
        ) from error


def _use_cpu(name: str) -> bool:
    # Several processes without an accelerator would otherwise train apart.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator is None
    device = available_device(name)
    if device.index is not None:
        raise UserError(
            f"--device {name}: training takes a kind of device; name it with --device "
            f"{device.type} and choose one by its number in the environment, such as "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    return device.type == "cpu"
