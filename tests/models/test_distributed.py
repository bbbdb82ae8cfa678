"""Data-parallel training over two processes."""

import copy
import os

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.models.registry import ATTENTIONS
from tests.models.cases import MAIN, assert_same, make_config, tokens


def compare(head, name, rank):
    """Gradients are the mean over processes, weights and features those of the first."""
    torch.manual_seed(rank)
    # One with reversible blocks, whose gradients arrive all at once.
    model = head(make_config(name, reversible=name == "favor-softmax"))
    parallel = DistributedDataParallel(model)
    alone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        ids = tokens(2, 9, seed=2 * step + rank)
        alone.load_state_dict(model.state_dict())
        alone.zero_grad()
        alone(ids, labels=ids).loss.backward()
        optimizer.zero_grad()
        parallel(ids, labels=ids).loss.backward()
        means = {name: p.grad / 2 for name, p in alone.named_parameters()}
        for mean in means.values():
            distributed.all_reduce(mean)
        found = {name: p.grad for name, p in model.named_parameters()}
        assert_same(found, means, rtol=1e-4, atol=1e-6)
        optimizer.step()
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in first.values():
        distributed.broadcast(tensor, 0)
    assert_same(model.state_dict(), first)


def train(rank, store):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for head, names in ((PerformerForMaskedLM, ATTENTIONS), (PerformerForCausalLM, MAIN)):
        for name in names:
            compare(head, name, rank)
    distributed.destroy_process_group()
    # Under load, gloo's threads can abort the interpreter's own exit.
    os._exit(0)


@pytest.mark.exhaustive
def test_two_processes_train_one_model(tmp_path):
    torch.multiprocessing.spawn(train, (str(tmp_path / "store"),), nprocs=2)
