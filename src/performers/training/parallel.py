"""Runs of several processes on accelerate's mesh: FSDP2, and rows cut over processes."""

from __future__ import annotations

import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import convert_outputs_to_fp32
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from performers.app.errors import UserError
from performers.distributed import check_alike, sequence_parallel, shard
from performers.distributed.batches import gather_positions, one_row, with_least_length
from performers.training.checkpoints import CheckpointTrainer

_NEEDED = {"accelerate": "1.15", "transformers": "5.24", "torch": "2.9"}


def mesh_arguments(
    processes: int, *, sequence_parallel: int = 1, blocks: Sequence[str] | None = None
) -> dict[str, Any]:
    """Arguments of ``TrainingArguments`` for a model whose weights are sharded by FSDP2.

    Args:
        processes: Processes of the run.
        sequence_parallel: Processes of each row: ``cp`` of accelerate's mesh. The others are
            ``dp_shard``, data parallel.
        blocks: Classes whose modules are each sharded for themselves; None: those that the model
            names (``_no_split_modules``); empty: none, as reversible blocks need.

    Raises:
        ValueError: There is one process, or their number is not a multiple of
            ``sequence_parallel``.
        RuntimeError: accelerate, transformers or torch is too old.
    """
    versions = {
        "accelerate": accelerate.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    for name, least in _NEEDED.items():
        if Version(versions[name]) < Version(least):
            raise RuntimeError(f"needs {name} {least} or later, this is {versions[name]}")
    if processes == 1 or processes % sequence_parallel:
        multiple = f", a multiple of {sequence_parallel}" if sequence_parallel > 1 else ""
        raise ValueError(f"needs several processes{multiple}, and this run has {processes}")
    return {
        "parallelism_config": accelerate.ParallelismConfig(
            dp_shard_size=processes // sequence_parallel, cp_size=sequence_parallel
        ),
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "auto_wrap_policy": "NO_WRAP" if blocks == () else "TRANSFORMER_BASED_WRAP",
            **({"transformer_layer_cls_to_wrap": list(blocks)} if blocks else {}),
        },
    }


class ParallelTrainer(CheckpointTrainer):
    """Trainer whose processes share weights (FSDP2) and rows, on the mesh of `mesh_arguments`.

    Rows are cut over the processes of ``cp`` in accelerate's mesh, which all read the same batch.
    The loss is divided by the labels of all processes, so that gradients are those of one process
    on the whole batch. Weights and random features of all processes are compared before the first
    step: FSDP2 does not broadcast them. Each process draws its own dropout.

    Raises:
        UserError: Weights or random features differ between processes.
    """

    sequence_group: dist.ProcessGroup | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and a group for the messages of rows."""
        if self.args.fsdp:
            _enable_fsdp_on_cpu()
            # Of accelerate's mesh; and of losses that Trainer scales in place, which are no views.
            for text in ("Slicing a flattened dim", "FSDP2-wrapped module"):
                warnings.filterwarnings("ignore", message=text, category=UserWarning)
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            # See `_compute_in_bfloat16_`.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None
        if self.get_cp_size() > 1:
            # A communicator of their own: messages must not be mixed up with FSDP's.
            ranks = self.accelerator.torch_device_mesh["cp"].mesh.tolist()
            world = torch.arange(self.args.world_size).view(-1, len(ranks)).tolist()
            self.sequence_group, _ = dist.new_subgroups_by_enumeration(world)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Compare the weights of all processes, seed each apart, and train."""
        if self.args.fsdp:
            try:
                check_alike(self.model)
            except ValueError as error:
                raise UserError(
                    f"the processes do not begin with one model: {error}; processors of different "
                    "kinds draw features that differ by rounding, so run on one kind"
                ) from error
            if self.args.bf16:
                _compute_in_bfloat16_(self.model, self.args.device.type)
        if self.args.world_size > 1:
            # Dropout, and masks that a collator draws, must not be those of another process.
            torch.manual_seed(self.args.seed + self.args.process_index)
        return super().train(*args, **kwargs)

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if self.sequence_group is None:
            return nullcontext, inputs
        shards, boundaries = self._cut(inputs)
        return partial(sequence_parallel, self.sequence_group, cu_seqlens=boundaries), shards

    def _cut(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int] | None]:
        """This process's shard of a batch, and the boundaries of the sequences in its row."""
        config, boundaries = self.model.config, None
        if "sequence_ids" in inputs:
            inputs, boundaries = one_row(inputs, is_causal=config.is_decoder)
        least = dist.get_world_size(self.sequence_group) * max(1, config.window or 0)
        inputs = with_least_length(inputs, least, pad=config.pad_token_id)
        if boundaries is not None:
            boundaries = [*boundaries, inputs["input_ids"].shape[1]]
        shards = shard(
            inputs, self.sequence_group, is_causal=config.is_decoder, cu_seqlens=boundaries
        )
        return shards, boundaries

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        """Context in which the model takes whole rows and computes its logits in shards."""
        if self.sequence_group is None:
            yield
            return
        group, length = self.sequence_group, 0

        def cut(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal length
            rows = {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
            length = rows["input_ids"].shape[1]
            return args, {**kwargs, **self._cut(rows)[0]}

        def join(module: nn.Module, args: Any, output: Any) -> Any:
            output["logits"] = gather_positions(output["logits"], group)[:, :length]
            return output

        handles = [
            self.model.register_forward_pre_hook(cut, with_kwargs=True),
            self.model.register_forward_hook(join),
        ]
        try:
            with sequence_parallel(group):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Sharded weights as whole ones, in the first process; None where they are not sharded.

        All processes call it.
        """
        if not self.args.fsdp:
            return None
        whole: dict[str, Tensor] = self.accelerator.get_state_dict(self.model)
        # Tied weights once.
        once = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        return {name: x for name, x in whole.items() if name in once}


def tied_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of a model that it has under several names."""
    seen: set[nn.Parameter] = set()
    tied: set[nn.Parameter] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (tied if parameter in seen else seen).add(parameter)
    return tied


def keep_ties_together_(model: Any) -> None:
    """Let accelerate shard all that is tied in one group.

    It shards the embeddings apart from the rest, with nothing but each other's weights in common;
    heads like BERT's share a bias too. Such a model tells it of no embeddings.
    """
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    if tied_parameters(model) - {getattr(x, "weight", None) for x in embeddings}:
        model.get_input_embeddings = model.get_output_embeddings = lambda: None


def keep_recorded_outputs_(model: nn.Module) -> None:
    """Let a sharded model give its hidden states.

    transformers knows by the names of classes what to record, and FSDP2 changes these.
    """
    # Not in the oldest releases.
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            _CAN_RECORD_REGISTRY[module] = getattr(module, "_can_record_outputs", None)


@torch.no_grad()
def copy_whole_(model: nn.Module, sharded: nn.Module) -> None:
    """Copy the weights and buffers of a copy of a model that FSDP2 has sharded into the model.

    All processes call it.
    """
    own, theirs = (
        dict[str, Tensor](
            [*x.named_parameters(remove_duplicate=False), *x.named_buffers(remove_duplicate=False)]
        )
        for x in (model, sharded)
    )
    for name, tensor in theirs.items():
        own[name].copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


@contextmanager
def lost_processes(remedy: str) -> Iterator[None]:
    """Context of a run that ends with one line when another of its processes has ended.

    Raises:
        UserError: A collective found another process gone, or waited for it in vain.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        if threading.current_thread() is threading.main_thread():
            # The launcher's; it must not end the process before the line is printed.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Without the place in gloo's sources.
        reason = re.sub(r"^\[[^\]]*\] ", "", str(error).strip().split("\n")[0]).split(". ")[0]
        raise UserError(
            f"process {os.environ.get('RANK', '0')} lost another one of this run, which has ended "
            f"or cannot be reached ({reason}); {remedy}"
        ) from error


def _compute_in_bfloat16_(model: nn.Module, device: str) -> None:
    """Let a model compute under autocast, as accelerate does in one process.

    Its policy for FSDP2 would also round the loss, norms, sums of gradients and logits to bfloat16.
    """
    autocast = torch.autocast(device, torch.bfloat16)
    model.forward = convert_outputs_to_fp32(autocast(model.forward))


def _enable_fsdp_on_cpu() -> None:
    """Let accelerate shard models in processes without accelerators, too.

    FSDP2 is torch's and runs on gloo; accelerate looks for it in a list of kinds of devices, and
    replaces this kind by ``FSDP``.
    """
    state = accelerate.PartialState()
    if state.distributed_type == accelerate.DistributedType.MULTI_CPU:
        state.distributed_type = accelerate.DistributedType.MULTI_GPU
