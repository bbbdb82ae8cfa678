"""Muon for the matrices, AdamW for the rest, as one optimizer."""

import copy

import pytest
import torch

from performers.models import PerformerForMaskedLM
from performers.training.optimizers import MuonAdamW
from tests.models.cases import VOCABULARY, make_config


def make_model(**options):
    torch.manual_seed(0)
    return PerformerForMaskedLM(make_config(**options))


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def outside_names(model):
    """Names of parameters that are no matrix inside the model."""
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim != 2 or "embed" in name or parameter.shape[0] == VOCABULARY
    }


def changed(model, before):
    """Names of parameters and buffers that are others than in a state, tied ones once."""
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name for name, value in now.items() if not torch.equal(value, before[name])}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_stepped_once_by_its_own_optimizer(tied):
    model = make_model(tie_word_embeddings=tied)
    reference = copy.deepcopy(model)
    outside = outside_names(reference)
    named, before = dict(reference.named_parameters()), copy.deepcopy(model.state_dict())
    matrices = [parameter for name, parameter in named.items() if name not in outside]
    # Queries with keys and values, the output, and the two of the feed-forward network.
    assert {name.split(".")[-2] for name in named if name not in outside} == {
        "query_key_value",
        "output",
        "mlp_input",
        "mlp_output",
    }
    tables = [named[name] for name in outside if named[name].ndim == 2]
    vectors = [named[name] for name in outside if named[name].ndim < 2]
    assert len(tables) == (1 if tied else 2)
    expected = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": tables, "weight_decay": 0.2},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=0.01,
            betas=(0.8, 0.9),
            eps=1e-6,
        ),
    ]
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    for seed in range(3):
        fill_gradients(model, seed)
        fill_gradients(reference, seed)
        optimizer.step()
        for part in expected:
            part.step()
    for name, parameter in model.named_parameters():
        # torch orthogonalizes in bfloat16.
        allowed = 0.0 if name in outside else 0.03 * (named[name] - before[name]).norm()
        assert (parameter - named[name]).norm() <= allowed, name


def test_updates_of_a_matrix_are_orthogonal_and_of_adamws_size():
    model = make_model()
    optimizer = MuonAdamW(model, lr=1.0, weight_decay=0.0)
    weight = model.performer.layers[0].mlp_input.weight
    before = weight.detach().clone()
    fill_gradients(model, 0)
    optimizer.step()
    update = weight.detach() - before
    values = torch.linalg.svdvals(update) / (0.2 * max(update.shape) ** 0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert 0.15 < update.square().mean().sqrt() < 0.25


def test_a_schedule_reaches_every_group_before_and_after_loading():
    model = make_model()
    optimizer = MuonAdamW(model, lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3
    fill_gradients(model, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    schedule.step()
    before = copy.deepcopy(model.state_dict())
    fill_gradients(model, 1)
    optimizer.step()
    assert not changed(model, before)


def test_a_saved_state_continues_to_the_same_weights(tmp_path):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            fill_gradients(model, seed)
            optimizer.step()
            optimizer.zero_grad()

    whole = make_model()
    steps(whole, MuonAdamW(whole, lr=0.01), range(5))
    parted = make_model()
    first = MuonAdamW(parted, lr=0.01)
    steps(parted, first, range(3))
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = MuonAdamW(parted, lr=0.02)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    steps(parted, second, range(3, 5))
    for one, other in zip(whole.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("trained", ["norm", "mlp_input.weight"])
def test_frozen_parameters_are_left_alone_and_either_part_may_be_missing(trained):
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    before = copy.deepcopy(model.state_dict())
    optimizer = MuonAdamW(model, lr=0.01)
    fill_gradients(model, 0)
    optimizer.step()
    assert changed(model, before) == {name for name in before if trained in name}


def test_a_copy_steps_by_itself():
    """With learning rates of its own, of which that of the matrices is zero."""
    model = make_model()
    twin, optimizer = copy.deepcopy((model, MuonAdamW(model, lr=0.01)))
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    for network, steps in ((twin, optimizer), (other, MuonAdamW(other, lr=0.01))):
        steps.param_groups[0]["lr"] = 0.0
        fill_gradients(network, 0)
        steps.step()
    assert changed(twin, other.state_dict()) == changed(model, before) == set()
    assert changed(twin, before) == outside_names(twin)


def test_a_closure_is_called_with_gradients_and_its_loss_comes_back():
    model = make_model()
    optimizer = MuonAdamW(model, lr=0.01)
    input_ids = torch.arange(8)[None]
    before = copy.deepcopy(model.state_dict())

    def closure():
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert changed(model, before)


def test_refusals():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        MuonAdamW(make_model().requires_grad_(False), lr=0.01)
    optimizer = MuonAdamW(make_model(), lr=0.01)
    with pytest.raises(NotImplementedError, match="make a new one"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
