"""Models learn; checkpoints and chunks of feed-forward blocks change nothing."""

import pytest
import torch

from performers.models import PerformerForMaskedLM
from tests.models.cases import (
    KINDS,
    MAIN,
    TOLERANCE,
    assert_same,
    build,
    causal_model,
    gradients,
    make_config,
    make_model,
    masked_model,
    right_padded,
    tokens,
)
from tests.models.memory import HeldBytes

pytestmark = pytest.mark.filterwarnings(
    # Its successor is not in every release that is supported.
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)


def run(model, ids, **options):
    """Loss and gradients."""
    torch.manual_seed(3)
    loss = model(ids, **{"labels": ids, **options}).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_runs(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE)
    assert_same(found[1], expected[1], **(tolerance or TOLERANCE))


@KINDS
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["masked", "packed"])
@pytest.mark.parametrize("name", MAIN)
def test_gradient_checkpointing_changes_nothing(name, kind, use_reentrant, is_causal):
    model = make_model(name, is_causal).train()
    ids, mask = right_padded([tokens(1, 9)[0], tokens(1, 6, seed=1)[0]])
    options = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if kind == "packed":
        options["sequence_ids"] = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    if use_reentrant:
        model.enable_input_require_grads()
    plain = run(model, ids, **options)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in model.performer.layers)
    calls = []
    model.performer.layers[0].mlp_norm.register_forward_hook(lambda *_: calls.append(1))
    assert_same_runs(run(model, ids, **options), plain)
    assert len(calls) == 2


def test_gradient_checkpointing_does_not_go_with_a_cache():
    model, ids = causal_model().train(), tokens(1, 4)
    model.gradient_checkpointing_enable()
    assert model(ids, use_cache=True).past_key_values is None
    past = model.eval()(ids).past_key_values
    assert past is not None
    with pytest.raises(ValueError, match="gradient checkpointing cannot be combined"):
        model.train()(ids, past_key_values=past)


@pytest.mark.parametrize("kind", ["plain", "reversible", "checkpointed"])
@pytest.mark.parametrize("chunk", [1, 19, 100])
def test_chunks_change_nothing(chunk, kind):
    """Dropout included; also inside a checkpoint."""
    options = {"reversible": kind == "reversible", "hidden_dropout_prob": 0.2}
    whole = masked_model(**options).train()
    parts = masked_model(**options, chunk_size_feed_forward=chunk).train()
    if kind == "checkpointed":
        parts.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 20)
    assert_same_runs(run(parts, ids), run(whole, ids), rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        both = [model.eval()(ids).logits for model in (parts, whole)]
    torch.testing.assert_close(*both, **TOLERANCE)


@pytest.mark.parametrize("reversible", [False, True])
def test_inner_activations_are_those_of_one_chunk(reversible):
    """No tensor of the inner width holds more tokens, forward or backward, and none is kept."""
    kept, peaks = {}, {}
    for chunk in (0, 16):
        options = {"chunk_size_feed_forward": chunk, "reversible": reversible}
        # An attention that holds next to nothing, on whichever backend.
        model = build(PerformerForMaskedLM, "identity", intermediate_size=224, **options).train()
        ids = tokens(2, 128)
        with HeldBytes() as held:
            loss = model(ids, labels=ids).loss
            kept[chunk] = held.now
            loss.backward()
        peaks[chunk] = held.peak
        assert held.largest[224] == 224 * max(2 * (chunk or 128), 32)
    # Input and output of the activation, in two layers, in float32.
    saved = 2 * 2 * 4 * 2 * 128 * 224
    if reversible:
        # None is kept anyway; of one layer they are while it is computed again.
        assert abs(kept[0] - kept[16]) < 0.01 * saved
        assert peaks[0] - peaks[16] > 0.6 * saved / 2
    else:
        assert kept[0] - kept[16] > 0.9 * saved


@pytest.mark.parametrize("reversible", [False, True])
def test_dropout_inside_is_the_same_when_it_is_computed_again(reversible, monkeypatch):
    """As that of an adapter on a layer of the feed-forward block."""
    model = masked_model(reversible=reversible, chunk_size_feed_forward=5).train()
    for block in model.performer.layers:
        block.activation = torch.nn.Sequential(block.activation, torch.nn.Dropout(0.3))
    ids = tokens(2, 20)
    found = run(model, ids)
    monkeypatch.setattr(
        "performers.models.block.checkpoint", lambda function, x, **options: function(x)
    )
    assert_same_runs(found, run(model, ids), rtol=1e-8, atol=1e-10)


def test_dropout_acts_in_training_only():
    model, ids = build(PerformerForMaskedLM, hidden_dropout_prob=0.5).train(), tokens(1, 8)
    assert (model(ids).logits != model(ids).logits).any()
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", MAIN)
def test_autocast(name):
    model, ids = PerformerForMaskedLM(make_config(name)).train(), tokens(2, 16)
    full = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids, labels=ids)
    half.loss.backward()
    assert half.logits.dtype == torch.bfloat16
    assert abs(half.loss.item() - full.item()) < 0.05
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
