"""Data-parallel training over two processes."""

import os
import subprocess
import sys

import pytest

DISTRIBUTED = """
import copy
import os
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.models.registry import ATTENTIONS
from tests.models.cases import MAIN, make_config, tokens

rank, file = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
for model_class, attentions in ((PerformerForMaskedLM, ATTENTIONS), (PerformerForCausalLM, MAIN)):
    for attention in attentions:
        # Different weights and features in each process, which DDP makes those of the first.
        torch.manual_seed(rank)
        # One of them with reversible blocks, whose gradients arrive all at once.
        model = model_class(make_config(attention, reversible=attention == "favor-softmax"))
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
            for (name, parameter), own in zip(
                model.named_parameters(), alone.parameters(), strict=True
            ):
                mean = own.grad / 2
                distributed.all_reduce(mean)
                torch.testing.assert_close(parameter.grad, mean, rtol=1e-4, atol=1e-6, msg=name)
            optimizer.step()
        for name, tensor in model.state_dict().items():
            other = tensor.clone()
            distributed.broadcast(other, 0)
            torch.testing.assert_close(other, tensor, rtol=0, atol=0, msg=name)
        assert all(p.grad is not None for p in model.parameters()), attention
distributed.destroy_process_group()
print("the mean in both processes", flush=True)
# Under load, gloo's threads can abort the interpreter's own exit.
os._exit(0)
"""


@pytest.mark.exhaustive
def test_two_processes_train_one_model(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=300)[0])
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert "the mean in both processes" in output
