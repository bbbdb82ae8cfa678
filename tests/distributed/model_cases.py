"""Models on one row over processes against one process: losses, gradients, training."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import performers
from performers.convert import load_performer, to_performer
from performers.convert.distillation.trainers import Row
from performers.distributed import check_alike, count_labels, sequence_parallel, shard
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM

from .attention_cases import relative

ENDS = (0, 30, 101, 160)


def make_model(kind: str) -> torch.nn.Module:
    """A small model, the same on all ranks."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    if "llama" in kind:
        config = LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0)
        model = to_performer(LlamaForCausalLM(config), num_features=32, window=8, sinks=2)
        model.config.use_cache = False
        return model
    options: dict[str, Any] = {
        "relu": {"attention": "favor-relu", "position_embedding": "sinusoidal"},
        "reversible": {"reversible": True, "window": 8},
        "masked": {"window": 8},
    }.get(kind, {"window": 8, "sinks": 2, "position_embedding": "rotary"})
    config = PerformerConfig(
        **sizes, **options, num_features=32, hidden_dropout_prob=0.0, use_cache=False
    )
    if kind == "masked":
        return PerformerForMaskedLM(config)
    model = PerformerForCausalLM(config)
    if kind == "checkpoints":
        model.gradient_checkpointing_enable()
    return model


def make_batch(kind: str, length: int = 160) -> dict[str, torch.Tensor]:
    """A row and its labels."""
    generator = torch.Generator().manual_seed(11)
    rows = 1 if kind == "packed" else 2
    ids = torch.randint(3, 40, (rows, length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    batch = {"input_ids": ids, "labels": labels}
    if kind == "masked" or "llama" in kind:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, -9:] = 0
        labels[0, -9:] = -100
    if kind == "packed":
        batch["position_ids"] = torch.cat([torch.arange(b - a) for a, b in pairwise(ENDS)])[None]
    return batch


def sharded_loss(
    model: Any, batch: dict[str, torch.Tensor], *, is_causal: bool = True
) -> torch.Tensor:
    """Part of this rank in the mean loss."""
    local = shard(batch, is_causal=is_causal)
    return model(**local, num_items_in_batch=count_labels(local["labels"])).loss


def model_errors(kind: str) -> dict[str, float]:
    """Errors of the loss and of the worst gradient."""
    model, batch = make_model(kind).train(), make_batch(kind)
    alone = copy.deepcopy(model)
    expected = alone(**batch).loss
    expected.backward()
    run = torch.compile(model, backend="eager") if kind == "compiled" else model
    sharded = kind.startswith("fsdp")
    if sharded:
        for layer in model.base_model.layers:
            fully_shard(layer)
        fully_shard(model)
    with sequence_parallel(cu_seqlens=ENDS if kind == "packed" else None):
        loss = sharded_loss(run, batch, is_causal=kind != "masked")
        # FSDP takes the mean of gradients over ranks.
        (loss * dist.get_world_size() if sharded else loss).backward()
    return {"loss": summed_error(loss, expected), "gradients": gradient_error(model, alone)}


def summed_error(loss: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of the sum over ranks."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return relative(total, expected.detach(), expected.detach())


def gradient_error(model: torch.nn.Module, alone: torch.nn.Module) -> float:
    """Worst error of a gradient summed over ranks; the sums stay in the model."""
    worst = 0.0
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        if theirs.grad is None:
            continue
        if isinstance(ours.grad, DTensor):
            grad = ours.grad.full_tensor()
        else:
            grad = ours.grad
            dist.all_reduce(grad)
        worst = max(worst, relative(grad, theirs.grad, theirs.grad))
    return worst


def training_errors(length: int, steps: int = 5) -> dict[str, float]:
    """Errors of the losses and of the parameters after some steps on one row."""
    model = make_model("causal").train()
    alone = copy.deepcopy(model)
    batch = {name: x[:1] for name, x in make_batch("causal", length).items()}
    ours, theirs = (torch.optim.SGD(x.parameters(), lr=0.1, momentum=0.9) for x in (model, alone))
    worst = 0.0
    for _ in range(steps):
        expected = alone(**batch).loss
        expected.backward()
        with sequence_parallel():
            loss = sharded_loss(model, batch)
            loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        worst = max(worst, summed_error(loss, expected))
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    parameters = max(
        relative(a.detach(), b.detach(), b.detach())
        for a, b in zip(model.parameters(), alone.parameters(), strict=True)
    )
    return {"loss": worst, "parameters": parameters}


KINDS = ("causal", "masked", "packed", "relu", "checkpoints", "reversible", "fsdp", "llama")
SLOW_KINDS = ("compiled", "fsdp llama")


def saved_error(folder: Path) -> dict[str, float]:
    """Difference of a converted model, sharded and saved as one file, from what is loaded."""
    model = make_model("llama").eval()
    batch = make_batch("llama")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model(**inputs).logits
    fully_shard(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=whole)
    dist.barrier()
    loaded = load_performer(folder).eval()
    return {"logits": relative(loaded(**inputs).logits, expected, expected)}


def short_row_error(rank: int) -> dict[str, float]:
    """Error of the logits of three tokens, of which the last process has one."""
    model = make_model("causal").eval()
    ids = make_batch("causal")["input_ids"][:, :3]
    expected = model(ids).logits
    with sequence_parallel():
        found = model(**shard({"input_ids": ids}, is_causal=True)).logits
    here = slice(2, 3) if rank else slice(0, 2)
    return {"logits": relative(found, expected[:, here], expected)}


def left_padded_error(rank: int) -> dict[str, float]:
    """Error of the logits of a row padded before its tokens, of a model that counts padding too."""
    torch.manual_seed(3)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 24}
    config = GPT2Config(**sizes, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    model = to_performer(GPT2LMHeadModel(config), num_features=8).eval()
    mask = torch.ones(1, 24, dtype=torch.int64)
    mask[:, :5] = 0
    batch = {"input_ids": torch.arange(3, 27)[None], "attention_mask": mask}
    expected = model(**batch, use_cache=False).logits
    row = Row(dist.group.WORLD)
    with sequence_parallel():
        local = row.shard(batch, is_causal=True, counts_padding=True)
        found = model(**local, use_cache=False).logits
    kept = row.cut(mask, 1) == 1
    return {"logits": relative(found[kept], row.cut(expected, 1)[kept], expected)}


def unlike_models(rank: int) -> str:
    """The refusal of models whose features differ between ranks."""
    model = make_model("causal")
    check_alike(model)
    if rank:
        performers.redraw_features_(model, torch.Generator().manual_seed(rank))
    try:
        check_alike(model)
    except ValueError as error:
        return str(error)
    return "accepted"


def all_errors(folder: Path, *, every: bool) -> dict[str, dict[str, float]]:
    """Errors of models, of a saved one and of a short training run."""
    kinds = (*KINDS, *SLOW_KINDS) if every else KINDS
    return {
        **{kind: model_errors(kind) for kind in kinds},
        "saved": saved_error(folder / "llama"),
        "five steps": training_errors(512),
        "short row": short_row_error(dist.get_rank()),
        "left padding": left_padded_error(dist.get_rank()),
    }
