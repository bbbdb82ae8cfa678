"""LSH attention against lists of buckets, shared-QK attention and Reformer of transformers."""

import math

import pytest
import torch
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from performers import redraw_features_
from performers.features import FeatureMap
from performers.models import PerformerForMaskedLM
from performers.models.context import AttentionContext
from studies.comparators.lsh import HashFeatures
from tests.models.cases import tokens
from tests.studies.comparators.oracle import (
    compare,
    contexts,
    dense,
    in_groups,
    inputs,
    make_config,
    make_mechanism,
)


def mechanism(buckets, chunk, rounds):
    return make_mechanism("lsh", buckets=buckets, chunk_size=chunk, rounds=rounds)


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


def points(count, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, count, width, generator=generator, dtype=torch.float64)


def hashes(buckets, rounds, width=16, **options):
    torch.manual_seed(0)
    return HashFeatures(width, buckets, rounds, **options)


@pytest.mark.parametrize("buckets", [1, 2, 6, 64, 128, 256])
def test_buckets_are_in_range_and_about_even(buckets):
    found = hashes(buckets, 3).hash(points(4000))
    assert found.shape == (1, 1, 3, 4000)
    assert found.min() >= 0
    assert found.max() < buckets
    for bucket in found[0, 0]:
        counts = torch.bincount(bucket, minlength=buckets).double()
        assert counts.max() < 4 * 4000 / buckets + 20
        assert (counts > 0).double().mean() > 0.85


def test_a_bucket_is_that_of_the_definition_and_one_of_many_is_a_pair():
    """Of as many as come nearest to the root, so that hashing is cheap."""
    features, x = hashes(6, 2), points(50)
    assert features.weight.shape == (1, 6, 16)
    for number, bucket in enumerate(features.hash(x)[0, 0]):
        rotated = x[0, 0] @ features.weight[0, 3 * number : 3 * number + 3].double().T
        assert torch.equal(bucket, torch.cat((rotated, -rotated), dim=-1).argmax(-1))
    for buckets, factors in ((128, (128,)), (256, (16, 16)), (144, (12, 12)), (132, (6, 22))):
        features = hashes(buckets, 2)
        assert features.factors == factors
        assert features.weight.shape[1] == sum(factors)
    features = hashes(256, 1)
    parts = (x[0, 0] @ part.T for part in features.weight[0].double().split(8))
    first, second = (torch.cat((part, -part), dim=-1).argmax(-1) for part in parts)
    assert torch.equal(features.hash(x)[0, 0, 0], 16 * first + second)


def test_hashes_depend_on_the_angle_alone():
    features, x = hashes(4, 2000), points(30)
    assert torch.equal(features.hash(x), features.hash(1e3 * x))
    assert (features.hash(x) != features.hash(-x)).all()
    one, other = torch.linalg.qr(x[0, 0, :2].T).Q.T
    angles = torch.linspace(0, math.pi, 7, dtype=torch.float64)
    row = torch.stack([angle.cos() * one + angle.sin() * other for angle in angles])[None, None]
    found = features.hash(row)[0, 0]
    shares = (found == found[:, :1]).double().mean(0)
    assert shares[0] == 1
    assert (shares[:-1] - shares[1:] > 0.02).all()
    assert shares[-1] == 0
    # At a right angle with two rows: both projections are independent, all buckets alike.
    assert shares[3] == pytest.approx(0.25, abs=0.04)


def test_heads_of_their_own():
    features = hashes(8, 2, num_heads=3)
    assert features.weight.shape == (3, 8, 16)
    x = points(200).expand(1, 3, -1, -1)
    found = features.hash(x)
    assert (found[:, 0] != found[:, 1]).any()
    shared = hashes(8, 2).hash(x)
    assert torch.equal(shared[:, 0], shared[:, 1])


def test_hashes_are_redrawn_with_the_features_and_stay_in_full_precision():
    torch.manual_seed(0)
    model = PerformerForMaskedLM(make_config("lsh")).eval()
    ids = tokens(2, 40)
    before = model(ids).logits
    assert torch.equal(before, model(ids).logits)
    maps = [module for module in model.modules() if isinstance(module, FeatureMap)]
    assert redraw_features_(model, torch.Generator().manual_seed(5)) == len(maps) == 2
    assert not torch.equal(maps[0].weight, maps[1].weight)
    after = model(ids).logits
    assert not torch.equal(before, after)
    redraw_features_(model, torch.Generator().manual_seed(5))
    assert torch.equal(after, model(ids).logits)
    model.to(torch.bfloat16)
    assert maps[0].weight.dtype == torch.float32
    assert torch.isfinite(model(ids).logits).all()
