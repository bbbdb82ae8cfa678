"""Feed-forward blocks that work on some tokens at a time."""

import pytest
import torch

from performers.models import PerformerForMaskedLM
from tests.models.cases import TOLERANCE, gradients, make_config, masked_model, tokens
from tests.models.memory import HeldBytes

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)


def run(model, ids):
    torch.manual_seed(3)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize(
    ("reversible", "checkpointed"), [(False, False), (True, False), (False, True)]
)
@pytest.mark.parametrize("chunk", [1, 4, 5, 19, 20, 100])
def test_chunks_change_nothing(chunk, reversible, checkpointed):
    """Dropout included; also inside a checkpoint."""
    options = {"reversible": reversible, "hidden_dropout_prob": 0.2}
    whole = masked_model(**options).train()
    parts = masked_model(**options, chunk_size_feed_forward=chunk).train()
    if checkpointed:
        parts.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(2, 20)
    (loss, found), (expected_loss, expected) = run(parts, ids), run(whole, ids)
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)
    with torch.no_grad():
        both = [model.eval()(ids).logits for model in (parts, whole)]
    torch.testing.assert_close(*both, **TOLERANCE)


@pytest.mark.parametrize("reversible", [False, True])
def test_inner_activations_are_those_of_one_chunk(reversible):
    """No tensor of the inner width holds more tokens, forward or backward, and none is kept."""
    kept, peaks = {}, {}
    for chunk in (0, 16):
        torch.manual_seed(0)
        # An attention that holds next to nothing, on whichever backend.
        config = make_config(
            "identity",
            intermediate_size=224,
            chunk_size_feed_forward=chunk,
            reversible=reversible,
        )
        model = PerformerForMaskedLM(config).train()
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
    loss, found = run(model, ids)
    monkeypatch.setattr(
        "performers.models.block.checkpoint", lambda function, x, **options: function(x)
    )
    expected_loss, expected = run(model, ids)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.exhaustive
def test_compiled_without_graph_breaks():
    torch.compiler.reset()
    model = masked_model(chunk_size_feed_forward=6)
    ids = tokens(2, 20)
    expected, wanted = run(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, **TOLERANCE)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=1e-8, msg=name)
    torch.compiler.reset()


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="chunk_size_feed_forward must be at least 0, got -1"):
        make_config(chunk_size_feed_forward=-1)
