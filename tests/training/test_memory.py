"""What a training needs at least: never more than it takes, and not far less."""

import psutil
import pytest
import torch

from performers.app.errors import UserError
from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.proteins.inputs.tokenizer import build_protein_tokenizer
from performers.training import memory
from performers.training.memory import machine_bytes, parameter_count, training_bytes
from performers.training.options import TrainingOptions

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 200, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"position_embedding": "learned"},
        {"position_embedding": "axial", "axial_shape": (8, 16)},
        {"attention": "exact"},
    ],
    ids=str,
)
def test_parameters_are_counted_but_for_the_head(options):
    model = PerformerForMaskedLM(PerformerConfig(**{**SIZES, **options}))
    body = sum(parameter.numel() for parameter in model.base_model.parameters())
    assert parameter_count(model.config) == body


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu", "exact", "identity"])
@pytest.mark.parametrize("chunk", [0, 16])
def test_activations_are_a_lower_bound(attention, chunk):
    config = PerformerConfig(**SIZES, attention=attention, chunk_size_feed_forward=chunk)
    model = PerformerForMaskedLM(config).train()
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}

    def count(tensor):
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    ids = torch.randint(5, 25, (4, 100))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    assert loss.requires_grad
    estimate = training_bytes(config, "adamw", ids.numel()) - training_bytes(config, "adamw")
    assert estimate <= sum(kept.values())
    assert estimate > 0.2 * sum(kept.values())


def test_the_optimiser_counts():
    config = PerformerConfig(hidden_size=512)
    count = parameter_count(config)
    assert 16 * count < training_bytes(config, "adamw") < 17 * count
    assert 12 * count < training_bytes(config, "muon") < 13 * count


def test_machines_share_what_is_sharded(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    options = {"hidden_size": 512, "num_layers": 4}
    count = parameter_count(TrainingOptions(**options).model_config(build_protein_tokenizer()))
    # Whole weights while the model is made, then an eighth of weights, gradients and state.
    monkeypatch.setattr(memory, "machine_bytes", lambda: 6 * count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    TrainingOptions(**options, fsdp=True)
    TrainingOptions(**options, sequence_parallel=4)
    with pytest.raises(UserError, match="needs at least"):
        TrainingOptions(**options)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    with pytest.raises(UserError, match="needs at least"):
        TrainingOptions(**options, fsdp=True)


def test_the_machine_has_memory_and_a_container_may_have_less(monkeypatch, tmp_path):
    physical = psutil.virtual_memory().total
    assert 0 < machine_bytes() <= physical
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    assert machine_bytes() == physical
    (tmp_path / "memory").mkdir()
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        (tmp_path / file).write_text("max\n")
    assert machine_bytes() == physical
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        (tmp_path / file).write_text("1000000\n")
    assert machine_bytes() == 1_000_000


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 10**9},
        {"hidden_size": 10**6},
        {"intermediate_size": 10**12},
        {"num_features": 10**12},
        {"num_features": 2**62},
        {"position_embedding": "learned", "max_length": 10**12, "batch_tokens": 10**12},
    ],
    ids=str,
)
def test_what_cannot_fit_is_refused_at_once(options):
    with pytest.raises(UserError, match=r"^a model of [\d,]+ parameters needs at least ") as caught:
        TrainingOptions(**options)
    assert "this machine has " in str(caught.value)
    assert "; lower --layers, --hidden-size" in str(caught.value)


def test_the_activations_of_a_batch_must_fit(monkeypatch):
    options = TrainingOptions(batch_tokens=100_000)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1_000_000_000)
    options.check_memory(10_000)
    with pytest.raises(UserError, match=r"activations of 50,000 tokens.*--batch-tokens"):
        options.check_memory(10**9)
    TrainingOptions(batch_tokens=100_000, reversible=True).check_memory(10**9)
    TrainingOptions(batch_tokens=100_000, gradient_checkpointing=True).check_memory(10**9)
