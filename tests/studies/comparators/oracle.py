"""Small models, and dense attention by the definition with the calls it is compared on."""

import torch
from torch import Tensor

from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.models.attention import build_mechanism
from performers.models.context import AttentionContext
from studies.comparators import COMPARATORS
from tests.models import cases

CAUSAL = tuple(name for name in COMPARATORS if name != "linformer")
EVERY = (*((name, False) for name in COMPARATORS), *((name, True) for name in CAUSAL))

# Sizes at which attention to a part of a short row is not attention to all of it.
SMALL = {
    "linformer": {"rank": 8},
    "lsh": {"buckets": 4, "chunk_size": 3, "rounds": 3},
    "routing": {"clusters": 3, "window": 4},
    "local": {"window": 3},
    "longformer": {"window": 2, "dilation": 2, "global_tokens": 1},
    "sparse": {"stride": 4, "summary": 2},
    "bigbird": {"block_size": 2, "global_blocks": 1, "random_blocks": 1},
}


def make_config(attention, options=None, **rest):
    """A configuration of a small model with options of its attention."""
    options = {**SMALL.get(attention, {}), **(options or {})}
    return cases.make_config(attention=attention, attention_options=options, **rest)


def make_model(attention, is_causal=False, *, options=None, seed=0, **rest):
    """A language model of either kind in float64, in eval mode."""
    torch.manual_seed(seed)
    kind = PerformerForCausalLM if is_causal else PerformerForMaskedLM
    return kind(make_config(attention, options, **rest)).double().eval()


def make_mechanism(attention, **options):
    """The mechanism of one layer for `inputs`, in float64."""
    torch.manual_seed(0)
    config = make_config(attention, options, hidden_size=24, num_attention_heads=3)
    return build_mechanism(config).double().eval()


def inputs(length, *, heads=3):
    """Queries, keys and values in float64 that gradients can reach."""
    shape = (3, 2, heads, length, 8)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [x.clone().requires_grad_() for x in drawn.unbind(0)]


def contexts(length):
    """Calls of every kind: plain, with holes, packed, packed with holes."""
    generator = torch.Generator().manual_seed(length)
    holes = torch.rand(2, length, generator=generator) < 0.7
    # The second row is padded on the left too, and all but one of its sequences begin inside.
    holes[1, : length // 3] = False
    starts = torch.rand(2, length, generator=generator) < 0.15
    starts[:, 0] = True
    ids = starts.long().cumsum(-1)
    return [
        AttentionContext(is_causal, key_mask=mask, sequence_ids=numbers, need_weights=True)
        for is_causal in (False, True)
        for mask in (None, holes)
        for numbers in (None, ids)
    ]


def rows(context, length):
    """Sequence by sequence: the row and the places of its tokens that are not masked."""
    for row in range(2):
        names = [0] * length if context.sequence_ids is None else context.sequence_ids[row].tolist()
        for name in sorted(set(names)):
            places = [i for i in range(length) if names[i] == name]
            if context.key_mask is not None:
                places = [i for i in places if context.key_mask[row, i]]
            if places:
                yield row, places


def pattern(context, sees, length, *, by_place=False):
    """The pairs allowed where a function says which ranks of a sequence, or places, see which."""
    allowed = torch.zeros(2, 3, length, length, dtype=torch.bool)
    for row, places in rows(context, length):
        index = torch.tensor(places)
        rank = index if by_place else torch.arange(len(places))
        for head in range(3):
            seen = sees(rank[:, None], rank[None], head)
            if context.is_causal:
                seen = seen & (rank[None] <= rank[:, None])
            allowed[row, head, index[:, None], index] = seen
    return allowed


def in_groups(context, group, reach):
    """The pairs of tokens that share a group in a round; a token by itself sees itself.

    Groups are of the shape ``(batch, heads, rounds, length)``; a token sees the nearest of its own.
    """
    batch, heads, _, length = group.shape
    allowed = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for row, places in rows(context, length):
        for head in range(heads):
            for numbers in group[row, head].tolist():
                for place in places:
                    members = [other for other in places if numbers[other] == numbers[place]]
                    rank = members.index(place)
                    end = rank if context.is_causal else rank + reach
                    allowed[row, head, place, members[max(0, rank - reach) : end + 1]] = True
    own = torch.eye(length, dtype=torch.bool)
    return allowed & ~(own & (allowed & ~own).any(-1, keepdim=True))


def dense(scores: Tensor, value: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the allowed pairs, and what it averages; zeros where there is none."""
    blind = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~(allowed | blind), -torch.inf).softmax(-1)
    weights = weights.masked_fill(blind, 0.0)
    return weights @ value, weights


def compare(mechanism, tensors, context, expected, layer=0):
    """The mechanism's output, matrix and gradients are those of the expected output and matrix."""
    out, weights = mechanism(*tensors, context, layer)
    expected_out, expected_weights = expected
    assert out.shape == expected_out.shape
    torch.testing.assert_close(out, expected_out, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-9, atol=1e-11)
    silent, none = mechanism(*tensors, context._replace(need_weights=False), layer)
    assert none is None
    torch.testing.assert_close(silent, out, rtol=0, atol=0)
    trained = [*tensors, *(p for p in mechanism.parameters() if p.requires_grad)]
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
    found, wanted = (
        torch.autograd.grad((x * probe).sum(), trained, allow_unused=True, retain_graph=True)
        for x in (silent, expected_out)
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
