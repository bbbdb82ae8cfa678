"""``PerformerConfig.position_window``: half of the heads see positions of all members."""

import pytest
import torch

from performers.attention.torch_backend import backend
from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.models.attention import FavorMechanism, PositionWindowMechanism
from performers.models.context import AttentionContext
from tests.models.cases import masked_model

IDS = torch.arange(3, 25)[None]
POSITIONS = torch.tensor([[*range(9), *range(6), *range(7)]])


def model(**options):
    options = {"num_attention_heads": 4, "intermediate_size": 32, **options}
    return masked_model(num_features=16, initializer_range=0.3, **options)


@pytest.mark.parametrize("options", [{}, {"features_per_head": True}, {"sinks": 1}], ids=str)
def test_windows_that_cover_a_row_are_exact_attention(options):
    exact, linear = model(attention="exact"), model(window=50, position_window=50, **options)
    linear.load_state_dict(exact.state_dict(), strict=False)
    mask = torch.ones_like(IDS)
    found, expected = (
        x(IDS, attention_mask=mask, position_ids=POSITIONS, output_attentions=True)
        for x in (linear, exact)
    )
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_which_heads_have_which_window():
    query, key, value = torch.randn(3, 1, 5, 22, 8, dtype=torch.float64).unbind()
    mechanism = model(window=2, position_window=1).performer.layers[0].attention.mechanism
    assert isinstance(mechanism, PositionWindowMechanism)
    context = AttentionContext(False, position_ids=POSITIONS, need_weights=True)
    _, weights = mechanism(query, key, value, context, 0)
    alone = AttentionContext(False, need_weights=True)
    near = FavorMechanism(mechanism.near.feature_map, window=2)
    expected = near(query[:, :2], key[:, :2], value[:, :2], alone, 0)[1]
    torch.testing.assert_close(weights[:, :2], expected)
    # Of two pairs at neighbouring positions of any members, weights compare as in softmax.
    logits = query @ key.mT / 8**0.5
    close = (POSITIONS[0][:, None] - POSITIONS[0]).abs() <= 1
    for head in (2, 3, 4):
        difference = (weights[0, head].log() - logits[0, head])[0][close[0]]
        torch.testing.assert_close(difference, difference[:1].expand_as(difference))
        others = (weights[0, head].log() - logits[0, head])[0][~close[0]]
        assert (others - difference[0]).abs().min() > 1e-6


@pytest.mark.parametrize(
    ("positions", "mask", "by_position"),
    [
        (None, [1] * 22, False),
        (None, [0, 0] + [1] * 17 + [0] * 3, False),
        (None, [1] * 9 + [0] + [1] * 12, True),
        ([5, *range(7, 28)], [0] + [1] * 21, False),
        ([5, *range(7, 28)], [1] * 22, True),
        (POSITIONS[0].tolist(), [1] * 22, True),
    ],
    ids=["one", "padded", "gap", "padding elsewhere", "jump", "relatives"],
)
def test_positions_that_count_up_take_the_window_of_the_row(
    monkeypatch, positions, mask, by_position
):
    """It is the same, and has compiled kernels."""
    calls = []
    rows = backend.position_window_rows
    monkeypatch.setattr(backend, "position_window_rows", lambda x: calls.append(x) or rows(x))
    network, mask = model(window=2, position_window=2), torch.tensor([mask])
    given = None if positions is None else torch.tensor([positions])
    found = network(IDS, attention_mask=mask, position_ids=given).logits[mask.bool()]
    assert bool(calls) == by_position
    monkeypatch.setattr("performers.models.modeling.counts_up", lambda *_: False)
    expected = network(IDS, attention_mask=mask, position_ids=given).logits[mask.bool()]
    torch.testing.assert_close(found, expected)


def test_batches_and_packed_rows():
    network = model(window=1, position_window=1)
    alone = network(IDS, attention_mask=torch.ones_like(IDS), position_ids=POSITIONS).logits[0]
    other = network(IDS[:, :13]).logits[0]
    ids, positions = torch.zeros(2, 22, dtype=torch.int64), torch.zeros(2, 22, dtype=torch.int64)
    ids[0], positions[0] = IDS[0], POSITIONS[0]
    ids[1, :13], positions[1, :13] = IDS[0, :13], torch.arange(13)
    found = network(ids, attention_mask=(ids > 0).long(), position_ids=positions).logits
    torch.testing.assert_close(found[0], alone)
    torch.testing.assert_close(found[1, :13], other)
    found = network(
        torch.cat((IDS[:, :13], IDS), dim=1),
        position_ids=torch.cat((torch.arange(13)[None], POSITIONS), dim=1),
        sequence_ids=torch.tensor([[0] * 13 + [1] * 22]),
        output_attentions=True,
    )
    torch.testing.assert_close(found.logits[0, 13:], alone)
    torch.testing.assert_close(found.logits[0, :13], other)
    assert not found.attentions[0][..., :13, 13:].any()


@pytest.mark.parametrize("reversible", [False, True])
def test_gradients_and_saving(tmp_path, reversible):
    network = model(position_window=1, reversible=reversible).train()
    loss = network(
        IDS, attention_mask=torch.ones_like(IDS), position_ids=POSITIONS, labels=IDS
    ).loss
    loss.backward()
    assert all(x.grad.isfinite().all() for x in network.parameters())
    network.eval().save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path).double()
    torch.testing.assert_close(loaded(IDS).logits, network(IDS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_decoder": True}, "no causal form"),
        ({"attention": "exact"}, "needs attention='favor-softmax'"),
        ({"attention": "favor-relu"}, "needs attention='favor-softmax'"),
        ({"num_attention_heads": 1}, "use 2 at least"),
        ({"position_window": -1}, "at least 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        PerformerConfig(**{"position_window": 2, **options})
