"""Comparison of calls between ranks."""

import pytest
import torch

import performers
from performers.attention.sharding import sharded
from performers.distributed import SequenceParallel, context


def test_a_rank_that_refuses_a_compared_call_sends_nothing(monkeypatch):
    """On a GPU, where the other ranks go on to the messages of the call."""
    x, features = torch.empty(1, 2, 12, 8, device="meta"), performers.SoftmaxFeatures(8)
    parallel = SequenceParallel(None, None)
    header = context._Header(12, *[0] * 14)
    parallel._seen[features] = context._Seen(features._buffers_version, header, (12, 12), (-1, -1))
    monkeypatch.setattr(context, "gather", lambda *args: pytest.fail("ranks wait for another"))
    with sharded(parallel), pytest.raises(ValueError, match="return_state cannot be combined"):
        performers.favor_attention(x, x, x, features, is_causal=True, return_state=True)
