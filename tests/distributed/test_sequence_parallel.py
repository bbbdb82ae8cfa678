"""Sequence parallelism over gloo against one process: outputs, gradients, models, refusals."""

import re

import pytest
import torch

from performers.attention.backends import backends
from tests.distributed.attention_cases import CASES

MODELS = (
    "causal",
    "masked",
    "packed",
    "relu",
    "checkpoints",
    "reversible",
    "compiled",
    "fsdp",
    "llama",
    "fsdp llama",
)
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
    "backend": "backend must be 'torch' for a part of a bidirectional row",
    "backward outside": r"call backward\(\) inside the context",
    "reversible": r"call backward\(\) inside the context",
    "no positions": "position_ids must be passed inside",
    "cache": "use_cache=False",
    "exact": 'attention="exact" inside',
    "one token": "a position for each of 2 processes, got rows of 1",
    "positions of a row of its own": r"position_ids begin again at 0 on rank 1",
    "positions of a converted model": r"position_ids begin again at 0 on rank 1",
    "classifier": "PerformerForSequenceClassification inside",
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_outputs_and_gradients(results_of, direction, case):
    for rank in results_of(2):
        errors = rank["attention"][f"{direction}: {case}"]
        assert set(errors) >= {"out", "query", "key", "value"}
        assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("name", backends())
def test_every_backend_continues_a_causal_row(results_of, name):
    for rank in results_of(2):
        assert max(rank["attention"][f"backend {name}"].values()) < 2e-6


@pytest.mark.parametrize("is_causal", [True, False])
def test_under_checkpoints(results_of, is_causal):
    for rank in results_of(2):
        assert max(rank["attention"][f"checkpoint, causal={is_causal}"].values()) < 2e-6


@pytest.mark.parametrize("is_causal", [True, False])
def test_bfloat16(results_of, is_causal):
    for rank in results_of(2):
        errors = rank["attention"][f"bfloat16, causal={is_causal}"]
        assert max(errors.values()) < 2 * torch.finfo(torch.bfloat16).eps, errors


def test_nan_reaches_the_rows_that_see_it(results_of):
    for rank in results_of(2):
        assert set(rank["attention"]["not finite"].values()) == {0.0}


def test_a_message_is_as_long_for_any_row(results_of):
    for rank in results_of(2):
        sizes = rank["attention"]["message"]
        # Four heads and 32 features: three sums; and seven keys, values and a mask at either edge.
        expected = 4 * (3 * 4 * 32 * (8 + 2) + 2 * 7 * (4 * (8 + 8) + 1))
        assert sizes == {"bytes": expected, "of a longer row": expected}


@pytest.mark.parametrize("kind", MODELS)
def test_models(results_of, kind):
    for rank in results_of(2):
        errors = rank["models"][f"model {kind}"]
        assert max(errors.values()) < 2e-6, errors


def test_a_sharded_model_is_saved_as_one(results_of):
    for rank in results_of(2):
        assert rank["models"]["saved"]["logits"] < 1e-6


def test_a_shard_of_one_token(results_of):
    for rank in results_of(2):
        assert rank["models"]["short row"]["logits"] < 2e-6


def test_positions_of_padding_before_the_tokens(results_of):
    for rank in results_of(2):
        assert rank["models"]["left padding"]["logits"] < 2e-6


def test_models_that_differ_between_ranks(results_of):
    for rank in results_of(2):
        found = rank["unlike models"]
        assert re.search(r"feature_map\.weight.* must hold the same numbers on all ranks", found)


def test_five_steps_of_training(results_of):
    for rank in results_of(2):
        assert max(rank["models"]["five steps"].values()) < 1e-5


@pytest.mark.parametrize(("case", "message"), REFUSALS.items())
def test_refusals_on_every_rank(results_of, case, message):
    for rank in results_of(2):
        assert re.search(message, rank["refusals"][case]), rank["refusals"][case]


def test_four_processes(results_of):
    for rank in results_of(4):
        assert len(rank["attention"]) == 7
        for errors in rank["attention"].values():
            assert max(errors.values()) < 2e-6, errors
