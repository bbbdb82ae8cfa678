"""Calls that are refused on every rank, and what they say."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

import performers
from performers.distributed import sequence_parallel, shard
from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForSequenceClassification,
)

from .attention_cases import make_features
from .model_cases import make_model


def make_small(head: Any = PerformerForCausalLM, **options: Any) -> Any:
    """A model of one layer."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return head(PerformerConfig(**sizes, intermediate_size=16, **options))


def refusals(rank: int) -> list[tuple[str, str]]:
    """A pattern for each call, and the message, which is empty where it was not refused."""
    found = []

    def refused(
        pattern: str, call: Any, *inputs: Any, ends: Any = None, backward: bool = False, **more: Any
    ) -> None:
        message = ""
        try:
            with sequence_parallel(cu_seqlens=ends):
                out = call(*inputs, **more)
            if backward:
                out.sum().backward()
        except (ValueError, RuntimeError) as error:
            message = f"{type(error).__name__}: {error}"
        found.append((pattern, message))

    x = query, key, value = torch.randn(3, 1, 2, 12, 8).requires_grad_().unbind(0)
    short = query[:, :, :5], key, value
    features = make_features("softmax", None, torch.float32)
    attend = partial(performers.favor_attention, feature_map=features)
    causal = partial(attend, is_causal=True)
    drop_in = performers.scaled_dot_product_attention

    unlike = performers.SoftmaxFeatures(8, 32, generator=torch.Generator().manual_seed(rank))
    refused("feature_map must hold the same numbers on all", causal, *x, feature_map=unlike)
    refused(r"window must be the same on all ranks .* \[4, 5\]", causal, *x, window=4 + rank)
    mask = torch.ones(1, 3 if rank == 0 else 12, dtype=torch.bool)
    wrong = r"key_mask must be a bool tensor|refused its arguments on ranks \[0\]"
    refused(wrong, causal, *x, key_mask=mask)
    state = performers.favor_state(key, value, features)
    refused("state cannot be combined", causal, *x, state=state)
    refused("return_state cannot be combined", causal, *x, return_state=True)
    refused("listed_keys cannot be combined", causal, *x, listed_keys=performers.KeyBuckets(8))
    nobody = torch.zeros(13).long(), torch.zeros(0).long()
    refused("neighbours cannot be combined", causal, *x, neighbours=nobody)
    refused("cu_seqlens must rise from 0 to the length 24 of the whole", causal, *x, ends=(0, 20))
    cut = torch.tensor((0, 5 + rank, 12))
    refused(r"go to sequence_parallel\(cu_seqlens=...\)", causal, *x, cu_seqlens=cut)
    unlike_ends = {"ends": (0, 5, 24), "cu_seqlens": torch.tensor((0, 7, 12))}
    refused("cu_seqlens of rank 0 are not those of sequence_parallel", causal, *x, **unlike_ends)
    refused("key must have as many positions as query", attend, *short)
    refused("key must have as many positions as query", drop_in, *short, is_causal=True)
    # On rank 1 all keys are hidden.
    rows, heads = (torch.full((1, *size, 12), rank == 0) for size in ((1, 12), (2, 1)))
    each = "attn_mask with a row for each query, .* cannot be read from the shard"
    refused(each, drop_in, *x, attn_mask=rows)
    refused("or for each head, cannot be read from the shard", drop_in, *x, attn_mask=heads)
    inside = "inside performers.distributed.sequence_parallel"
    weights = performers.favor_attention_weights
    refused(f"favor_attention_weights {inside}", weights, query, key, features)
    refused(f"favor_state {inside}", performers.favor_state, key, value, features)
    part = r"backend must be '\w+' for a part of a bidirectional row, got 'reference'"
    refused(part, attend, *x, backend="reference")
    some = [y.detach().requires_grad_(n != rank) for n, y in enumerate(x)]
    refused("requires_grad must be the same on all ranks", attend, *some)

    def second_derivative() -> None:
        (grad,) = torch.autograd.grad(attend(*x, backend="torch").sum(), key, create_graph=True)
        torch.autograd.grad(grad.sum(), key)

    refused("has no second derivative", second_derivative)
    outside = r"call backward\(\) inside the context"
    refused(outside, checkpoint, causal, *x, use_reentrant=False, backward=True)

    ids = torch.arange(12)[None]
    later = ids + 12 * rank

    def reversible() -> torch.Tensor:
        return make_small(reversible=True).train()(ids, position_ids=later).logits

    refused(outside, reversible, backward=True)
    refused("position_ids must be passed inside", make_small(), ids, use_cache=False)
    refused("use_cache=False", make_small().eval(), ids, position_ids=later)
    alone = {"position_ids": ids, "use_cache": False}
    refused('attention="exact" inside', make_small(attention="exact"), ids, **alone)
    refused("position_ids begin again at 0 on rank 1", make_small(), ids, **alone)
    refused("position_ids begin again at 0 on rank 1", make_model("llama").eval(), ids, **alone)
    classifier = make_small(PerformerForSequenceClassification)
    refused("PerformerForSequenceClassification inside", classifier, ids, position_ids=ids)
    one = {"input_ids": ids[:, :1]}
    refused("a position for each of 2 processes, got rows of 1", shard, one, is_causal=True)
    return found
