"""Calls in a sequence-parallel context, without other processes."""

import threading
from typing import NamedTuple

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import performers
from performers.attention.call import AttentionCall
from performers.attention.sharding import sharded
from performers.distributed import SequenceParallel, context


def test_a_rank_that_refuses_a_compared_call_sends_nothing(monkeypatch):
    """On a GPU, where the other ranks go on to the messages of the call."""
    x, features = torch.empty(1, 2, 12, 8, device="meta"), performers.SoftmaxFeatures(8)
    parallel = SequenceParallel(None, None)
    header = context._Header(12, *[0] * 14)
    parallel._seen[features] = context._Seen(features._buffers_version, header, (12, 12), (-1, -1))
    monkeypatch.setattr(context, "gather", lambda *args: pytest.fail("ranks wait for another"))
    with pytest.raises(ValueError, match="return_state cannot be combined"):
        parallel.attend(AttentionCall(x, x, x, features, return_state=True), None)


class Factor(NamedTuple):
    """Takes the values of a call, times a number, for its output."""

    row: float

    def attend(self, call, backend):
        return self.row * call.value.unsqueeze(2)


def checkpointed(x, features):
    return checkpoint(performers.favor_attention, x, x, x, features, use_reentrant=True)


def test_a_checkpoint_is_computed_again_for_the_row_of_its_forward_pass():
    x, features = torch.randn(1, 2, 12, 8, requires_grad=True), performers.SoftmaxFeatures(8)
    with sharded(Factor(2.0)):
        out = checkpointed(x, features).sum()
    with sharded(Factor(3.0)), pytest.raises(RuntimeError, match="another group or cu_seqlens"):
        out.backward()
    # Threads that entered no context, as those of autograd, find the one of the forward pass.
    with sharded(Factor(2.0)):
        out = checkpointed(x, features).sum()
        with sharded(Factor(3.0)):
            thread = threading.Thread(target=out.backward)
            thread.start()
            thread.join()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))
