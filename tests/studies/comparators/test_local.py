"""Sliding-window attention against its definition, and against Longformer of transformers."""

import pytest
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from performers.models.context import AttentionContext
from studies.comparators import LocalMechanism
from tests.studies.comparators.oracle import compare, contexts, dense, inputs, rows


def pattern(context, batch, length, window):
    allowed = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for row, places in rows(context, batch, length):
        index = torch.tensor(places)
        gap = index[:, None] - index
        seen = (gap.abs() <= window) & ((gap >= 0) | (not context.is_causal))
        allowed[row, 0, index[:, None], index] = seen
    return allowed


@pytest.mark.parametrize(
    ("length", "window"), [(1, 0), (2, 5), (16, 4), (33, 0), (33, 16), (50, 17), (70, 20), (70, 99)]
)
def test_the_window_of_the_definition(length, window):
    mechanism = LocalMechanism(window)
    query, key, value = tensors = inputs(length)
    for context in contexts(length):
        scores = query @ key.transpose(-1, -2) / 8**0.5
        allowed = pattern(context, 2, length, window)
        compare(mechanism, tensors, context, dense(scores, value, allowed))


@torch.no_grad()
def test_it_is_longformers_window():
    config = LongformerConfig(
        hidden_size=24,
        num_attention_heads=3,
        attention_window=[16],
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = LongformerSelfAttention(config, 0).double().eval()
    hidden = torch.randn(2, 64, 24, dtype=torch.float64)
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, 50:] = False
    expected = theirs(
        hidden,
        attention_mask=torch.zeros(2, 64, dtype=torch.float64).masked_fill(~mask, -10000.0),
        is_index_masked=~mask,
        is_index_global_attn=torch.zeros_like(mask),
        is_global_attn=False,
    )[0]
    tensors = [
        linear(hidden).unflatten(-1, (3, 8)).transpose(1, 2)
        for linear in (theirs.query, theirs.key, theirs.value)
    ]
    context = AttentionContext(is_causal=False, key_mask=mask)
    out = LocalMechanism(8)(*tensors, context, 0)[0].transpose(1, 2).flatten(2)
    # Theirs computes the shares in float32.
    torch.testing.assert_close(out[mask], expected[mask], rtol=1e-5, atol=1e-6)
