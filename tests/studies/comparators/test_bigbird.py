"""BigBird's pattern against one written with lists, and its random blocks."""

import pytest
import torch

from performers.models.context import AttentionContext
from studies.comparators import BigBirdMechanism
from studies.comparators.bigbird import chosen_blocks
from tests.studies.comparators.oracle import compare, contexts, dense, inputs, pattern


def scrambled(x):
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) % 2**32
    return (x >> 16) ^ x


def seen_blocks(block, total, mechanism, *, is_causal, layer, head, heads):
    """The key blocks of one query block, as a set."""
    count = mechanism.random_blocks
    known = {*range(mechanism.global_blocks), block - 1, block, block + 1}
    there = range(block + 1) if is_causal else range(total)
    rest = [other for other in there if other not in known]
    for part in range(count):
        choice = rest[len(rest) * part // count : len(rest) * (part + 1) // count]
        if choice:
            seed = scrambled((layer * heads + head) * count + part + 1)
            known.add(choice[scrambled(scrambled(block) ^ seed) % len(choice)])
    if block < mechanism.global_blocks and not is_causal:
        known.update(there)
    return known.intersection(there)


def sees(mechanism, context, layer):
    def seen(i, j, head):
        size, count = mechanism.block_size, len(i)
        total = -(-count // size)
        allowed = torch.zeros(count, count, dtype=torch.bool)
        for block in range(total):
            blocks = seen_blocks(
                block,
                total,
                mechanism,
                is_causal=context.is_causal,
                layer=layer,
                head=head,
                heads=3,
            )
            keys = torch.isin(j[0] // size, torch.tensor(sorted(blocks)))
            allowed[block * size : (block + 1) * size] = keys
        return allowed

    return seen


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (1, (4, 1, 1)),
        (9, (4, 2, 3)),
        (41, (3, 2, 1)),
        (41, (3, 0, 2)),
        (41, (3, 2, 0)),
        (30, (1, 1, 3)),
        (30, (64, 2, 3)),
    ],
    ids=str,
)
def test_the_pattern_of_the_definition(length, options):
    mechanism = BigBirdMechanism(*options)
    query, key, value = tensors = inputs(length)
    for layer, context in enumerate(contexts(length)):
        scores = query @ key.transpose(-1, -2) / 8**0.5
        allowed = pattern(context, sees(mechanism, context, layer), length)
        compare(mechanism, tensors, context, dense(scores, value, allowed), layer)


def picks(blocks, *, is_causal, layer=0, num_random=3):
    """The blocks that those of one long row see, ``(T, heads, K)``."""
    chosen = chosen_blocks(
        torch.tensor([blocks]),
        num_heads=4,
        num_global=2,
        num_random=num_random,
        is_causal=is_causal,
        layer=layer,
    )
    return [x[0].transpose(0, 1) for x in chosen]


def test_random_blocks_differ_and_cover():
    """Between heads and layers, and evenly over the sequence."""
    first, other = (picks(400, is_causal=False, layer=layer)[0][..., -3:] for layer in (0, 1))
    assert (first == other).float().mean() < 0.05
    assert (first[:, 0] == first[:, 1]).float().mean() < 0.05
    counts = torch.bincount(first.flatten(), minlength=400)[2:].float()
    # 12 heads times parts for each block, about evenly.
    assert abs(counts.mean() - 12) < 0.2
    assert counts.std() < 2 * 12**0.5
    assert torch.equal(first, picks(400, is_causal=False)[0][..., -3:])


def test_rows_without_tokens():
    tensors = inputs(6)
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    context = AttentionContext(is_causal=False, key_mask=nothing, need_weights=True)
    out, weights = BigBirdMechanism(2, 1, 1)(*tensors, context, 0)
    assert (out == 0).all()
    assert weights.shape == (2, 3, 6, 6)
    assert (weights == 0).all()
