"""LSH attention against lists of buckets, shared-QK attention and Reformer of transformers."""

import pytest
import torch
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from performers.models import PerformerForMaskedLM
from performers.models.context import AttentionContext
from studies.comparators import HashFeatures, LshMechanism
from tests.studies.comparators.oracle import (
    compare,
    contexts,
    dense,
    in_groups,
    inputs,
    make_config,
)


def mechanism(buckets, chunk, rounds, width=8):
    torch.manual_seed(0)
    return LshMechanism(HashFeatures(width, buckets, rounds), chunk)


def pattern(module, query, context):
    return in_groups(context, module.feature_map.hash(query), module.reach)


def shared_scores(query):
    norm = query.norm(dim=-1, keepdim=True).clamp_min(0.01)
    return query @ (query / norm).transpose(-1, -2)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (1, (2, 4, 2)),
        (5, (2, 1, 1)),
        (33, (4, 3, 4)),
        (40, (1, 4, 3)),
        (40, (2, 50, 3)),
        (60, (200, 6, 4)),
    ],
    ids=str,
)
def test_the_buckets_of_the_definition(length, options):
    module = mechanism(*options)
    query, _, value = inputs(length)
    for context in contexts(length):
        allowed = pattern(module, query, context)
        expected = dense(shared_scores(query), value, allowed)
        compare(module, (query, query, value), context, expected)


@torch.no_grad()
@pytest.mark.parametrize("is_causal", [False, True])
def test_within_one_chunk_it_is_the_attention_of_transformers(is_causal):
    config = ReformerConfig(
        hidden_size=24,
        num_attention_heads=3,
        attention_head_size=8,
        lsh_attn_chunk_length=64,
        num_hashes=1,
        num_buckets=2,
        is_decoder=is_causal,
        lsh_attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = LSHSelfAttention(config, 0).double().eval()
    hidden = torch.randn(2, 30, 24, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 21:] = False
    expected = theirs(hidden, attention_mask=mask).hidden_states
    query, value = (
        linear(hidden).unflatten(-1, (3, 8)).transpose(1, 2)
        for linear in (theirs.query_key, theirs.value)
    )
    out = mechanism(1, 64, 1)(query, query, value, AttentionContext(is_causal, key_mask=mask), 0)[0]
    out = out.transpose(1, 2).flatten(2)
    # Theirs adds 1e-6 to squared norms.
    torch.testing.assert_close(out[mask], expected[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_gradient_of_a_query_near_zero_is_bounded(need_weights):
    """Padding that no mask hides has such queries in the first layer."""
    module = mechanism(2, 64, 2)
    for size in (0.0, 1e-9, 1e-3, 0.011):
        query, _, value = inputs(20)
        query = query.detach()
        query[:, :, 3] *= size / query[:, :, 3].norm(dim=-1, keepdim=True)
        query.requires_grad_()
        context = AttentionContext(is_causal=False, need_weights=need_weights)
        out, weights = module(query, query, value, context, 0)
        gradient = torch.autograd.grad((weights if need_weights else out).square().sum(), query)[0]
        assert gradient[:, :, 3].norm(dim=-1).max() < 1e3
        allowed = pattern(module, query, context)
        compare(
            module,
            (query, query, value),
            context._replace(need_weights=True),
            dense(shared_scores(query), value, allowed),
        )


def test_loud_and_half_precision_tokens_stay_finite():
    query, _, value = (x.detach() for x in inputs(50))
    context = AttentionContext(is_causal=True)
    module = mechanism(4, 8, 3)
    for factor in (1e-30, 1e6):
        assert torch.isfinite(module(factor * query, query, value, context, 0)[0]).all()
    full = module(query, query, value, context, 0)[0]
    half = module(*(x.to(torch.bfloat16) for x in (query, query, value)), context, 0)[0]
    assert half.dtype == torch.bfloat16
    close = (half.double() - full).norm(dim=-1) < 0.05 * full.norm(dim=-1)
    # A rounded query may fall into another bucket.
    assert close.double().mean() > 0.9


def test_the_projection_has_two_parts():
    model = PerformerForMaskedLM(make_config("lsh"))
    attention = model.performer.layers[0].attention
    assert attention.query_key_value.weight.shape == (64, 32)
    exact = PerformerForMaskedLM(make_config("exact"))
    difference = sum(p.numel() for p in exact.parameters()) - sum(
        p.numel() for p in model.parameters()
    )
    assert difference == 2 * (32 * 32 + 32)
