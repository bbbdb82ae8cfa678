"""Calls that are refused on every rank, and what they say."""

from collections.abc import Callable
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


def refusals(rank: int) -> dict[str, str]:
    """Messages by case; empty where nothing was refused."""
    query, key, value = torch.randn(3, 1, 2, 12, 8).requires_grad_().unbind(0)
    features = make_features("softmax", None, torch.float32)
    unlike = performers.SoftmaxFeatures(8, 32, generator=torch.Generator().manual_seed(rank))
    ids = torch.arange(12)[None]

    def attend(maps: Any = features, boundaries: Any = None, **options: Any) -> None:
        with sequence_parallel(cu_seqlens=boundaries):
            performers.favor_attention(query, key, value, maps, is_causal=True, **options)

    def model(head: Any = PerformerForCausalLM, **options: Any) -> Any:
        config = PerformerConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            **options,
        )
        return head(config)

    def run(model: Any, **inputs: Any) -> None:
        with sequence_parallel():
            model(ids, **inputs)

    def cross() -> None:
        with sequence_parallel():
            performers.favor_attention(query[:, :, :5], key, value, features)

    def drop_in(*inputs: torch.Tensor, **options: Any) -> None:
        with sequence_parallel():
            performers.scaled_dot_product_attention(*inputs, **options)

    def weights() -> None:
        with sequence_parallel():
            performers.favor_attention_weights(query, key, features)

    def state_of_keys() -> None:
        with sequence_parallel():
            performers.favor_state(key, value, features)

    def bidirectional() -> None:
        with sequence_parallel():
            performers.favor_attention(query, key, value, features, backend="reference")

    def backward_outside() -> None:
        with sequence_parallel():
            out = checkpoint(
                lambda *x: performers.favor_attention(*x, features, is_causal=True),
                query,
                key,
                value,
                use_reentrant=False,
            )
        out.sum().backward()

    def second_derivative() -> None:
        with sequence_parallel():
            out = performers.favor_attention(query, key, value, features, backend="torch")
            (grad,) = torch.autograd.grad(out.sum(), key, create_graph=True)
            torch.autograd.grad(grad.sum(), key)

    def some_gradients() -> None:
        tensors = [x.detach().requires_grad_(n != rank) for n, x in enumerate((query, key, value))]
        with sequence_parallel():
            performers.favor_attention(*tensors, features)

    def reversible() -> None:
        with sequence_parallel():
            out = model(reversible=True).train()(ids, position_ids=ids + 12 * rank)
        out.logits.sum().backward()

    def converted() -> None:
        llama = make_model("llama").eval()
        with sequence_parallel():
            llama(ids, position_ids=ids, use_cache=False)

    # On rank 1 all keys are hidden.
    rows, heads = (torch.full((1, *x, 12), rank == 0) for x in ((1, 12), (2, 1)))
    wrong_mask = torch.ones(1, 3 if rank == 0 else 12, dtype=torch.bool)
    cases: dict[str, Callable[[], None]] = {
        "features": lambda: attend(unlike),
        "window": lambda: attend(window=4 + rank),
        "mask on one rank": lambda: attend(key_mask=wrong_mask),
        "state": lambda: attend(state=performers.favor_state(key, value, features)),
        "return_state": lambda: attend(return_state=True),
        "listed_keys": lambda: attend(listed_keys=performers.KeyBuckets(8)),
        "neighbours": lambda: attend(neighbours=(torch.zeros(13).long(), torch.zeros(0).long())),
        "short boundaries": lambda: attend(boundaries=(0, 5, 20)),
        "boundaries of a shard": lambda: attend(cu_seqlens=torch.tensor((0, 5 + rank, 12))),
        "other boundaries": lambda: attend(
            boundaries=(0, 5, 24), cu_seqlens=torch.tensor((0, 7, 12))
        ),
        "cross attention": cross,
        "causal cross attention": lambda: drop_in(query[:, :, :5], key, value, is_causal=True),
        "rows of a mask": lambda: drop_in(query, key, value, attn_mask=rows),
        "heads of a mask": lambda: drop_in(query, key, value, attn_mask=heads),
        "weights": weights,
        "state of keys": state_of_keys,
        "backend": bidirectional,
        "backward outside": backward_outside,
        "second derivative": second_derivative,
        "other gradients": some_gradients,
        "reversible": reversible,
        "no positions": lambda: run(model(), use_cache=False),
        "cache": lambda: run(model().eval(), position_ids=ids + 12 * rank),
        "exact": lambda: run(model(attention="exact"), position_ids=ids, use_cache=False),
        "one token": lambda: shard({"input_ids": ids[:, :1]}, is_causal=True) and None,
        "positions of a row of its own": lambda: run(model(), position_ids=ids, use_cache=False),
        "positions of a converted model": converted,
        "classifier": lambda: run(model(PerformerForSequenceClassification), position_ids=ids),
    }
    return {name: _message(case) for name, case in cases.items()}


def _message(case: Callable[[], None]) -> str:
    try:
        case()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
