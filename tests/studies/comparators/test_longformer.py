"""Longformer's window, dilation and global tokens against their definition."""

import pytest
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from performers.models.context import AttentionContext
from studies.comparators import LocalMechanism, LongformerMechanism
from tests.studies.comparators.oracle import compare, contexts, dense, inputs, pattern


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (1, (2, 2, 1)),
        (5, (2, 3, 8)),
        (33, (4, 1, 2)),
        (33, (0, 3, 1)),
        (40, (3, 2, 0)),
        (41, (5, 4, 3)),
        (70, (17, 3, 2)),
    ],
    ids=str,
)
def test_the_pattern_of_the_definition(length, options):
    mechanism = LongformerMechanism(*options)
    window, dilation, count = options

    def sees(i, j, head):
        distance = (i - j).abs()
        near = (distance <= window * dilation) & (distance % dilation == 0)
        return near | (i < count) | (j < count)

    query, key, value = tensors = inputs(length)
    for context in contexts(length):
        scores = query @ key.transpose(-1, -2) / 8**0.5
        allowed = pattern(context, 2, 3, length, sees)
        compare(mechanism, tensors, context, dense(scores, value, allowed))


def test_without_dilation_and_global_tokens_it_is_the_window():
    tensors = inputs(50)
    for is_causal in (False, True):
        context = AttentionContext(is_causal)
        out = LongformerMechanism(7, 1, 0)(*tensors, context, 0)[0]
        torch.testing.assert_close(out, LocalMechanism(7)(*tensors, context, 0)[0])


@torch.no_grad()
def test_it_is_the_attention_of_transformers():
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
    first = torch.arange(64).expand(2, -1) < 2
    bias = torch.zeros(2, 64, dtype=torch.float64).masked_fill(~mask, -10000.0)
    expected = theirs(
        hidden,
        attention_mask=bias.masked_fill(first, 10000.0),
        is_index_masked=~mask,
        is_index_global_attn=first,
        is_global_attn=True,
    )[0]
    tensors = [
        linear(hidden).unflatten(-1, (3, 8)).transpose(1, 2)
        for linear in (theirs.query, theirs.key, theirs.value)
    ]
    context = AttentionContext(is_causal=False, key_mask=mask)
    out = LongformerMechanism(8, 1, 2)(*tensors, context, 0)[0].transpose(1, 2).flatten(2)
    # Theirs computes the shares in float32.
    torch.testing.assert_close(out[mask], expected[mask], rtol=1e-5, atol=1e-6)
