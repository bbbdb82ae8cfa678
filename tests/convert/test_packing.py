"""Several sequences in a row, told apart by their positions."""

import pytest
import torch

from tests.convert.architectures import (
    build,
    converted,
    output,
    token_ids,
)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma3"])
def test_packed_sequences_equal_sequences_alone(name, batch):
    model = converted(build(name), num_features=16, window=2, sinks=1)
    ids = token_ids(batch, 24)
    lengths = [5, 12, 7]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(batch, -1)
    packed = output(model, {"input_ids": ids}, position_ids=positions, use_cache=False)
    alone = [output(model, {"input_ids": x}, use_cache=False) for x in ids.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-5, rtol=1e-4)


def test_rows_may_be_packed_differently():
    model = converted(build("llama"), num_features=16, window=2)
    ids = token_ids(2, 20)
    splits = [[20], [3, 17]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in splits])
    packed = output(model, {"input_ids": ids}, position_ids=positions, use_cache=False)
    for row, lengths in enumerate(splits):
        parts = ids[row : row + 1].split(lengths, 1)
        alone = [output(model, {"input_ids": x}, use_cache=False) for x in parts]
        torch.testing.assert_close(packed[row], torch.cat(alone, 1)[0], atol=2e-5, rtol=1e-4)


def test_packed_training_has_gradients():
    model = converted(build("llama"), num_features=16, window=2).train()
    positions = torch.arange(20).remainder(10).expand(2, -1)
    loss = model(token_ids(2, 20), position_ids=positions, use_cache=False).logits.square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
