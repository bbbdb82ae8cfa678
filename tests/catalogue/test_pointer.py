import pytest
import torch
from torch.nn import functional as F

from performers.catalogue import PerformerPointer


@pytest.fixture(params=[False, True], ids=["all", "ends"])
def model(request):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    return PerformerPointer(
        2, hidden_size=32, num_heads=2, encoder_layers=1, ends=request.param, generator=generator
    )


def scores_of(model, points, answer):
    """Scores of all places, in one pass over the right answers."""
    encoded = model.encode(points)
    hidden = model._inputs(encoded, answer)
    for block in model.decoder:
        hidden = block(hidden, is_causal=True, memory=encoded[:, : points.shape[1]])
    return model.pointing(model.decoder_norm(hidden)) @ encoded.mT / 32**0.5


def test_decoding_follows_the_scores_of_the_loss(model):
    """Greedy steps with a state are the maxima of one pass over the same sequence."""
    points = torch.rand(3, 9, 2)
    with torch.no_grad():
        answer = model.decode(points)
        scores = scores_of(model, points, answer)
    for row in range(3):
        chosen = []
        for step, point in enumerate(answer[row].tolist()):
            free = [number for number in range(scores.shape[2]) if number not in chosen]
            best = max(free, key=lambda number: float(scores[row, step, number]))
            assert best == (9 if point == -100 else point)
            if point == -100:
                break
            chosen.append(point)


def test_the_loss_is_the_cross_entropy_of_free_points(model):
    points = torch.rand(2, 6, 2)
    target = torch.tensor([[3, 1, 0, 2], [5, 4, -100, -100]])
    scores, losses = scores_of(model, points, target), []
    for row in range(2):
        for step in range(int((target[row] >= 0).sum())):
            masked = scores[row, step].index_fill(0, target[row, :step], float("-inf"))
            losses.append(F.cross_entropy(masked[None], target[row, step][None]))
    torch.testing.assert_close(model.loss(points, target), torch.stack(losses).mean())


def test_padding_changes_nothing(model):
    points, target = torch.rand(2, 7, 2), torch.stack([torch.randperm(7) for _ in range(2)])
    padded = F.pad(points, (0, 0, 0, 3), value=9.0)
    key_mask = torch.ones(2, 10, dtype=torch.bool)
    key_mask[:, 7:] = False
    torch.testing.assert_close(
        model.loss(padded, target, key_mask=key_mask), model.loss(points, target)
    )
    answer = model.decode(padded, key_mask=key_mask)
    kept = model.decode(points)
    if model.end is None:
        assert torch.equal(answer, kept)
    assert set(answer.flatten().tolist()) <= {*range(7), -100}


def test_the_sampled_loss_tends_to_the_exact_one():
    torch.manual_seed(0)
    model = PerformerPointer(2, hidden_size=32, num_heads=2, encoder_layers=1)
    points = torch.rand(1, 50, 2)
    # With one step nothing has been chosen before, which only the exact loss hides.
    target = torch.tensor([[17]])
    exact = model.loss(points, target).item()
    sampled = model.loss(points, target, num_samples=20_000)
    assert abs(sampled.item() - exact) < 0.05
    sampled.backward()
    assert model.encoder[0].own.query.weight.grad is not None


def test_refusals(model):
    points = torch.rand(1, 4, 2)
    with pytest.raises(ValueError, match="target must be below"):
        model.loss(points, torch.tensor([[5]]))
    mask = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="key_mask"):
        model.loss(points, torch.tensor([[1]]), key_mask=mask, num_samples=3)
    with pytest.raises(ValueError, match="hidden_size must be a multiple"):
        PerformerPointer(2, hidden_size=30, num_heads=4)
