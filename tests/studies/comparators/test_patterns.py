"""Windows, Longformer and the Sparse Transformer against their definitions and transformers."""

import pytest
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from performers.models.context import AttentionContext
from studies.comparators import LocalMechanism, LongformerMechanism, SparseMechanism
from tests.studies.comparators.oracle import compare, contexts, dense, inputs, pattern


def local(window):
    return LocalMechanism(window), lambda i, j, head, layer: (i - j).abs() <= window


def longformer(window, dilation, count):
    def sees(i, j, head, layer):
        distance = (i - j).abs()
        near = (distance <= window * dilation) & (distance % dilation == 0)
        return near | (i < count) | (j < count)

    return LongformerMechanism(window, dilation, count), sees


def strided(stride, summary):
    """Section 4.2 of the paper: the first two of three heads begin with the window."""

    def sees(i, j, head, layer):
        if (head < 2) == (layer % 2 == 0):
            return (i - j).abs() <= stride
        return (i - j) % stride == 0

    return SparseMechanism(stride, "strided", summary), sees


def fixed(stride, summary):
    def sees(i, j, head, layer):
        if (head < 2) == (layer % 2 == 0):
            return i // stride == j // stride
        return (j % stride >= stride - summary).expand(len(i), -1)

    return SparseMechanism(stride, "fixed", summary), sees


SPARSE = [(1, 4, 2), (5, 8, 3), (33, 4, 4), (40, 7, 2), (24, 1, 1)]
CASES = [
    *((local, *x) for x in ((1, 0), (2, 5), (16, 4), (33, 0), (50, 17), (40, 99))),
    *((longformer, *x) for x in ((1, 2, 2, 1), (5, 2, 3, 8), (33, 4, 1, 2), (33, 0, 3, 1))),
    *((longformer, *x) for x in ((40, 3, 2, 0), (41, 5, 4, 3))),
    *((make, *x) for make in (strided, fixed) for x in SPARSE),
]


def _label(value):
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    ("make", "length", "options"), [(x, n, y) for x, n, *y in CASES], ids=_label
)
def test_the_pattern_of_the_definition(make, length, options):
    mechanism, sees = make(*options)
    query, key, value = tensors = inputs(length)
    scores = query @ key.transpose(-1, -2) / 8**0.5
    for layer, context in enumerate(contexts(length)):
        allowed = pattern(
            context,
            lambda i, j, head, layer=layer: sees(i, j, head, layer),
            length,
            by_place=make is local,
        )
        compare(mechanism, tensors, context, dense(scores, value, allowed), layer)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mechanism", "count"), [(LocalMechanism(8), 0), (LongformerMechanism(8, 1, 2), 2)], ids=str
)
def test_it_is_the_attention_of_transformers(mechanism, count):
    """With the projections of its global tokens those of the others."""
    config = LongformerConfig(
        hidden_size=24,
        num_attention_heads=3,
        attention_window=[16],
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = LongformerSelfAttention(config, 0).double().eval()
    for name in ("query", "key", "value"):
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
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
    context = AttentionContext(is_causal=False, key_mask=mask)
    out = mechanism(*tensors, context, 0)[0].transpose(1, 2).flatten(2)
    # Theirs computes the shares in float32.
    torch.testing.assert_close(out[mask], expected[mask], rtol=1e-5, atol=1e-6)


def test_one_head_alternates_from_layer_to_layer():
    mechanism = SparseMechanism(4, "strided", 1)
    tensors = inputs(20, heads=1)
    context = AttentionContext(is_causal=True, need_weights=True)
    first, second = (mechanism(*tensors, context, layer)[1][0, 0, 17] for layer in (0, 1))
    assert first.nonzero()[:, 0].tolist() == [13, 14, 15, 16, 17]
    assert second.nonzero()[:, 0].tolist() == [1, 5, 9, 13, 17]
