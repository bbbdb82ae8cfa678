"""The Sparse Transformer's patterns against their definitions."""

import pytest
import torch

from performers.models.context import AttentionContext
from studies.comparators import SparseMechanism
from tests.studies.comparators.oracle import compare, contexts, dense, inputs, pattern


def sees(mechanism, layer):
    """Mask of ranks by ranks for each of three heads, from section 4.2 of the paper."""
    stride, summary = mechanism.stride, mechanism.summary

    def strided(i, j, head):
        if (head < 2) == (layer % 2 == 0):
            return (i - j).abs() <= stride
        return (i - j) % stride == 0

    def fixed(i, j, head):
        if (head < 2) == (layer % 2 == 0):
            return i // stride == j // stride
        return (j % stride >= stride - summary).expand(len(i), -1)

    return strided if mechanism.pattern == "strided" else fixed


@pytest.mark.parametrize("name", ["strided", "fixed"])
@pytest.mark.parametrize(
    ("length", "stride", "summary"),
    [(1, 4, 2), (5, 8, 3), (16, 4, 1), (33, 4, 4), (40, 7, 2), (50, 17, 3), (24, 1, 1)],
)
def test_the_pattern_of_the_definition(name, length, stride, summary):
    mechanism = SparseMechanism(stride, name, summary)
    query, key, value = tensors = inputs(length)
    for layer, context in enumerate(contexts(length)):
        allowed = pattern(context, 2, 3, length, sees(mechanism, layer))
        scores = query @ key.transpose(-1, -2) / 8**0.5
        compare(mechanism, tensors, context, dense(scores, value, allowed), layer)


def test_one_head_alternates_from_layer_to_layer():
    mechanism = SparseMechanism(4, "strided", 1)
    tensors = inputs(20, heads=1)
    context = AttentionContext(is_causal=True, need_weights=True)
    first, second = (mechanism(*tensors, context, layer)[1][0, 0, 17] for layer in (0, 1))
    assert first.nonzero()[:, 0].tolist() == [13, 14, 15, 16, 17]
    assert second.nonzero()[:, 0].tolist() == [1, 5, 9, 13, 17]


def test_a_stride_as_long_as_the_sequence_is_exact_attention_in_half_of_the_heads():
    tensors = inputs(20, heads=4)
    for name in ("strided", "fixed"):
        for is_causal in (False, True):
            context = AttentionContext(is_causal)
            out = SparseMechanism(32, name, 2)(*tensors, context, 0)[0][:, :2]
            query, key, value = (x[:, :2] for x in tensors)
            expected = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=is_causal
            )
            torch.testing.assert_close(out, expected)
