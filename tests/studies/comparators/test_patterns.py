"""Patterns of places against their definitions and transformers."""

import pytest
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from performers.models.context import AttentionContext
from tests.studies.comparators.oracle import (
    compare,
    contexts,
    dense,
    inputs,
    make_mechanism,
    pattern,
)

# Options, and a function of ranks (i, j), head, layer and direction: which pairs are seen.


def local(window):
    return {"window": window}, lambda i, j, *_: (i - j).abs() <= window


def longformer(window, dilation, count):
    def sees(i, j, *_):
        distance = (i - j).abs()
        near = (distance <= window * dilation) & (distance % dilation == 0)
        return near | (i < count) | (j < count)

    return {"window": window, "dilation": dilation, "global_tokens": count}, sees


def strided(stride):
    """Section 4.2 of the paper: the first two of three heads begin with the window."""

    def sees(i, j, head, layer, is_causal):
        if (head < 2) == (layer % 2 == 0):
            return (i - j).abs() <= stride
        return (i - j) % stride == 0

    return {"stride": stride, "pattern": "strided"}, sees


def fixed(stride, summary):
    def sees(i, j, head, layer, is_causal):
        if (head < 2) == (layer % 2 == 0):
            return i // stride == j // stride
        return (j % stride >= stride - summary).expand(len(i), -1)

    return {"stride": stride, "pattern": "fixed", "summary": summary}, sees


def scrambled(x):
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) % 2**32
    return (x >> 16) ^ x


def bigbird(size, num_global, num_random):
    """Blocks that see blocks, listed one by one."""

    def seen_blocks(block, total, head, layer, is_causal):
        known = {*range(num_global), block - 1, block, block + 1}
        there = range(block + 1) if is_causal else range(total)
        rest = [other for other in there if other not in known]
        for part in range(num_random):
            bounds = (len(rest) * part // num_random, len(rest) * (part + 1) // num_random)
            if choice := rest[slice(*bounds)]:
                seed = scrambled((layer * 3 + head) * num_random + part + 1)
                known.add(choice[scrambled(scrambled(block) ^ seed) % len(choice)])
        if block < num_global and not is_causal:
            known.update(there)
        return sorted(known.intersection(there))

    def sees(i, j, *place):
        total = -(-len(i) // size)
        seen = torch.zeros(total, total, dtype=torch.bool)
        for block in range(total):
            seen[block, seen_blocks(block, total, *place)] = True
        return seen[i // size, j // size]

    options = {"block_size": size, "global_blocks": num_global, "random_blocks": num_random}
    return options, sees


CASES = {
    local: [(1, 0), (2, 5), (16, 4), (33, 0), (50, 17), (40, 99)],
    longformer: [
        *((1, 2, 2, 1), (5, 2, 3, 8), (33, 4, 1, 2), (33, 0, 3, 1), (40, 3, 2, 0), (41, 5, 4, 3)),
    ],
    strided: [(1, 4), (5, 8), (33, 4), (40, 7), (24, 1)],
    fixed: [(1, 4, 2), (5, 8, 3), (33, 4, 4), (40, 7, 2), (24, 1, 1)],
    bigbird: [
        *((1, 4, 1, 1), (9, 4, 2, 3), (41, 3, 2, 1), (41, 3, 0, 2), (41, 3, 2, 0), (30, 1, 1, 3)),
        (30, 64, 2, 3),
    ],
}


@pytest.mark.parametrize(
    ("make", "length", "options"),
    [(make, length, options) for make in CASES for length, *options in CASES[make]],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_pattern_of_the_definition(make, length, options):
    settings, sees = make(*options)
    name = "sparse" if make in (strided, fixed) else make.__name__
    mechanism = make_mechanism(name, **settings)
    query, key, value = tensors = inputs(length)
    scores = query @ key.transpose(-1, -2) / 8**0.5
    for layer, context in enumerate(contexts(length)):

        def seen(i, j, head, place=(layer, context.is_causal)):
            return sees(i, j, head, *place)

        allowed = pattern(context, seen, length, by_place=make is local)
        compare(mechanism, tensors, context, dense(scores, value, allowed), layer)


@torch.no_grad()
@pytest.mark.parametrize(("name", "count"), [("local", 0), ("longformer", 2)])
def test_it_is_the_attention_of_transformers(name, count):
    """With the projections of its global tokens those of the others."""
    config = LongformerConfig(
        hidden_size=24,
        num_attention_heads=3,
        attention_window=[16],
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = LongformerSelfAttention(config, 0).double().eval()
    for part in ("query", "key", "value"):
        getattr(theirs, f"{part}_global").load_state_dict(getattr(theirs, part).state_dict())
    hidden = torch.randn(2, 64, 24, dtype=torch.float64)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, 50:] = False
    first = torch.arange(64).expand(2, -1) < count
    bias = torch.zeros(2, 64, dtype=torch.float64).masked_fill(~mask, -10000.0)
    expected = theirs(
        hidden,
        attention_mask=bias.masked_fill(first, 10000.0),
        is_index_masked=~mask,
        is_index_global_attn=first,
        is_global_attn=count > 0,
    )[0]
    tensors = [
        linear(hidden).unflatten(-1, (3, 8)).transpose(1, 2)
        for linear in (theirs.query, theirs.key, theirs.value)
    ]
    more = {"dilation": 1, "global_tokens": count} if count else {}
    mechanism = make_mechanism(name, window=8, **more)
    out = mechanism(*tensors, AttentionContext(is_causal=False, key_mask=mask), 0)[0]
    # Theirs computes the shares in float32.
    out = out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(out[mask], expected[mask], rtol=1e-5, atol=1e-6)


def test_one_head_alternates_from_layer_to_layer():
    mechanism = make_mechanism("sparse", stride=4, summary=1)
    tensors = inputs(20, heads=1)
    context = AttentionContext(is_causal=True, need_weights=True)
    first, second = (mechanism(*tensors, context, layer)[1][0, 0, 17] for layer in (0, 1))
    assert first.nonzero()[:, 0].tolist() == [13, 14, 15, 16, 17]
    assert second.nonzero()[:, 0].tolist() == [1, 5, 9, 13, 17]


def test_random_blocks_differ_and_cover():
    """Between heads and layers, and evenly over the sequence."""
    mechanism = make_mechanism("bigbird", block_size=1, global_blocks=2, random_blocks=3)
    tensors = inputs(400)
    context = AttentionContext(is_causal=False, need_weights=True)
    place = torch.arange(400)
    known = ((place[:, None] - place).abs() <= 1) | (place < 2)
    first, other, again = (
        ((mechanism(*tensors, context, layer)[1][0] > 0) & ~known)[:, 2:] for layer in (0, 1, 0)
    )
    assert torch.equal(first, again)
    assert (first.sum(-1) == 3).all()
    for one, two in ((first, other), (first[0], first[1])):
        assert (one & two).sum() < 0.05 * one.sum()
    counts = first.sum((0, 1))[2:].double()
    # 9 heads times parts for each block, about evenly.
    assert abs(counts.mean() - 9) < 0.2
    assert counts.std() < 2 * 9**0.5


def test_rows_without_tokens():
    tensors = inputs(6)
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    context = AttentionContext(is_causal=False, key_mask=nothing, need_weights=True)
    out, weights = make_mechanism("bigbird")(*tensors, context, 0)
    assert (out == 0).all()
    assert weights.shape == (2, 3, 6, 6)
    assert (weights == 0).all()
