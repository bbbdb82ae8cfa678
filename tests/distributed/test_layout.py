"""Sequences of a row over ranks, and the cut of a batch."""

import bisect
import random

import pytest
import torch
import torch.distributed as dist

from performers.distributed import sequence_parallel, shard
from performers.distributed.layout import find_layout


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("lengths", "ends", "message"),
    [
        ((9, 2, 9), None, "window=3 reaches across the whole shard of rank 1, 2 positions"),
        ((9, 0, 9), None, "query must have a position on every rank"),
        ((4, 4, 4), (0, 5, 4, 12), "cu_seqlens must rise from 0 to the length 12"),
        ((4, 4, 4), (1, 12), "cu_seqlens must rise from 0 to the length 12"),
        ((4, 4, 4), (), "cu_seqlens must rise from 0 to the length 12"),
    ],
)
def test_refusals_are_the_same_on_all_ranks(lengths, ends, message, rank):
    with pytest.raises(ValueError, match=message):
        find_layout(lengths, rank, ends, 3)


def test_layouts_of_random_rows():
    draw = random.Random(0)
    for _ in range(200):
        lengths = tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 5)))
        total = sum(lengths)
        ends = (0, *sorted(draw.randint(0, total) for _ in range(draw.randint(0, 6))), total)
        owner = [rank for rank, length in enumerate(lengths) for _ in range(length)]
        sequence = [bisect.bisect_right(ends, place) for place in range(total)]
        for rank in range(len(lengths)):
            local = [sequence[place] for place in range(total) if owner[place] == rank]
            # One sequence has no boundaries, or these.
            given = None if len(ends) == 2 and rank % 2 else ends
            head, inner, tail = find_layout(lengths, rank, given, None)
            changes = [i for i in range(1, len(local)) if local[i] != local[i - 1]]
            assert inner == (*changes, len(local))
            for piece, which in ((head, local[0]), (tail, local[-1])):
                assert (piece.start, piece.stop) == (
                    local.index(which),
                    len(local) - local[::-1].index(which),
                )
                ranks = {owner[place] for place in range(total) if sequence[place] == which}
                assert piece.before == tuple(sorted(r for r in ranks if r < rank))
                assert piece.after == tuple(sorted(r for r in ranks if r > rank))


def test_short_shards_at_the_ends_of_a_sequence():
    find_layout((2, 9, 1), 1, None, 3)
    find_layout((9, 2, 9), 1, (0, 9, 20), 3)


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_shard():
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    cut = shard({"input_ids": ids, "labels": ids, "attention_mask": mask}, is_causal=True)
    assert cut["shift_labels"].tolist() == [[1, 2, 3, 4, -100], [6, 7, 8, 9, -100]]
    assert cut["labels"].tolist() == cut["shift_labels"].tolist()
    assert cut["position_ids"].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 3]]
    assert cut["input_ids"].data_ptr() != ids.data_ptr()
    assert "shift_labels" not in shard({"input_ids": ids, "labels": ids}, is_causal=False)
    packed = shard({"input_ids": ids[:1]}, is_causal=True, cu_seqlens=(0, 2, 2, 5))
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2]]


@pytest.mark.usefixtures("group_of_one")
def test_shard_refuses_what_it_cannot_cut():
    ids = torch.arange(10).view(2, 5)
    with pytest.raises(ValueError, match="batch must have input_ids or inputs_embeds"):
        shard({"labels": ids}, is_causal=True)
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 5\)"):
        shard({"input_ids": ids, "labels": ids[:, 0]}, is_causal=True)


def test_a_group_is_needed():
    with (
        pytest.raises(ValueError, match="sequence_parallel needs a process group"),
        sequence_parallel(),
    ):
        pass
