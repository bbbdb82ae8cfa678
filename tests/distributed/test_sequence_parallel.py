"""Sequence parallelism over gloo against one process: outputs, gradients, models, refusals."""

import re

import pytest
import torch

from performers.attention.backends import backends
from tests.distributed.attention_cases import BY_DEFAULT, CALLS
from tests.distributed.model_cases import KINDS, SLOW_KINDS

REFUSALS = {
    "features": "feature_map must hold the same numbers on all ranks",
    "window": r"window must be the same on all ranks .* \[4, 5\]",
    "mask on one rank": r"key_mask must be a bool tensor|refused its arguments on ranks \[0\]",
    "state": "state cannot be combined",
    "return_state": "return_state cannot be combined",
    "listed_keys": "listed_keys cannot be combined",
    "neighbours": "neighbours cannot be combined",
    "short boundaries": "cu_seqlens must rise from 0 to the length 24 of the whole row",
    "boundaries of a shard": r"go to sequence_parallel\(cu_seqlens=...\)",
    "other boundaries": "cu_seqlens of rank 0 are not those of sequence_parallel",
    "cross attention": "key must have as many positions as query",
    "causal cross attention": "key must have as many positions as query",
    "rows of a mask": "attn_mask with a row for each query, .* cannot be read from the shard",
    "heads of a mask": "attn_mask .* or for each head, cannot be read from the shard",
    "weights": "favor_attention_weights inside performers.distributed.sequence_parallel",
    "state of keys": "favor_state inside performers.distributed.sequence_parallel",
    "backend": r"backend must be '\w+' for a part of a bidirectional row, got 'reference'",
    "backward outside": r"call backward\(\) inside the context",
    "second derivative": "has no second derivative",
    "other gradients": "requires_grad must be the same on all ranks",
    "reversible": r"call backward\(\) inside the context",
    "no positions": "position_ids must be passed inside",
    "cache": "use_cache=False",
    "exact": 'attention="exact" inside',
    "one token": "a position for each of 2 processes, got rows of 1",
    "positions of a row of its own": r"position_ids begin again at 0 on rank 1",
    "positions of a converted model": r"position_ids begin again at 0 on rank 1",
    "classifier": "PerformerForSequenceClassification inside",
}


def some(values, by_default):
    """Values, of which all but some are left to ``-m exhaustive``."""
    return [x if x in by_default else mark(x) for x in values]


def mark(x):
    return pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(("direction", "case"), some(CALLS, BY_DEFAULT))
def test_outputs_and_gradients(results, direction, case):
    for rank in results[2]:
        errors = rank["attention"][f"{direction}: {case}"]
        assert set(errors) >= {"out", "query", "key", "value"}
        assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("name", backends())
def test_every_backend_continues_a_causal_row(results, name):
    for rank in results[2]:
        assert max(rank["attention"][f"backend {name}"].values()) < 2e-6


@pytest.mark.parametrize(
    ("call", "tolerance"),
    [
        ("torch, causal=False", 2e-6),
        ("checkpoint, causal=True", 2e-6),
        ("checkpoint, causal=False", 2e-6),
        ("bfloat16, causal=True", 2 * torch.finfo(torch.bfloat16).eps),
        ("bfloat16, causal=False", 2 * torch.finfo(torch.bfloat16).eps),
        ("a dimension of a mesh", 2e-6),
    ],
)
def test_other_calls(results, call, tolerance):
    for rank in results[2]:
        errors = rank["attention"][call]
        assert max(errors.values()) < tolerance, errors


def test_nan_reaches_the_rows_that_see_it(results):
    for rank in results[2]:
        assert set(rank["attention"]["not finite"].values()) == {0.0}


def test_a_message_is_as_long_for_any_row(results):
    for rank in results[2]:
        sizes = rank["attention"]["message"]
        # Four heads and 32 features: three sums; and seven keys, values and a mask at either edge.
        expected = 4 * (3 * 4 * 32 * (8 + 2) + 2 * 7 * (4 * (8 + 8) + 1))
        assert sizes == {"bytes": expected, "of a longer row": expected}


@pytest.mark.parametrize("kind", some((*KINDS, *SLOW_KINDS), KINDS))
def test_models(results, kind):
    for rank in results[2]:
        errors = rank["models"][f"model {kind}"]
        assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize(
    ("case", "tolerance"),
    [("saved", 1e-6), ("short row", 2e-6), ("left padding", 2e-6), ("five steps", 1e-5)],
)
def test_models_saved_padded_and_trained(results, case, tolerance):
    for rank in results[2]:
        assert max(rank["models"][case].values()) < tolerance


def test_models_that_differ_between_ranks(results):
    for rank in results[2]:
        found = rank["unlike models"]
        assert re.search(r"feature_map\.weight.* must hold the same numbers on all ranks", found)


@pytest.mark.parametrize(("case", "message"), REFUSALS.items())
def test_refusals_on_every_rank(results, case, message):
    for rank in results[2]:
        assert re.search(message, rank["refusals"][case]), rank["refusals"][case]


@pytest.mark.parametrize("world", some((3, 4), (3,)))
def test_ranks_between_others(results, world):
    for rank in results[world]:
        assert len(rank["attention"]) == {3: 3, 4: 7}[world]
        for errors in rank["attention"].values():
            assert max(errors.values()) < 2e-6, errors
