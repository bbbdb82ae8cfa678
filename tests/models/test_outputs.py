"""Outputs of forward calls, eager and compiled, for every mechanism and kind of position."""

import pytest
import torch

from performers import SoftmaxFeatures
from performers.models import PerformerForMaskedLM
from performers.models.configuration import POSITIONS
from tests.models.cases import (
    KINDS,
    MAIN,
    NAMES,
    TOLERANCE,
    VOCABULARY,
    assert_same,
    build,
    gradients,
    make_model,
    masked_model,
    right_padded,
    rows_of,
    tokens,
)


@pytest.mark.parametrize("positions", POSITIONS)
@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name, positions, is_causal):
    model = make_model(name, is_causal, position_embedding=positions).train()
    ids = tokens(2, 9)
    output = model(ids, labels=ids)
    assert output.logits.shape == (2, 9, VOCABULARY)
    assert torch.isfinite(output.logits).all()
    output.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("positions", POSITIONS)
def test_position_ids_are_used(positions):
    """Of rotary positions only the distances count."""
    model, ids = masked_model("exact", position_embedding=positions), tokens(1, 6)
    places = torch.arange(6)[None]
    plain = model(ids).logits
    same, moved, stretched = (
        model(ids, position_ids=x).logits for x in (places, places + 40, 3 * places)
    )
    torch.testing.assert_close(same, plain)
    assert (stretched - plain).abs().max() > 1e-3
    if positions == "rotary":
        torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)
    else:
        assert (moved - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*MAIN, "reversible"])
def test_hidden_states(name):
    model, ids = masked_model(name), tokens(2, 7)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(state.shape == (2, 7, 32) for state in output.hidden_states)
    torch.testing.assert_close(output.hidden_states[0], model.performer.embeddings(ids))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    plain = model(ids)
    assert plain.hidden_states is plain.attentions is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MAIN)
def test_half_precision_stays_near_full_precision(name, dtype):
    model = build(PerformerForMaskedLM, name)
    ids, mask = right_padded(rows_of(40, 21))
    full = model(ids, attention_mask=mask).logits
    half = model.to(dtype)(ids, attention_mask=mask).logits
    assert half.dtype == dtype
    real = mask.bool()
    assert torch.isfinite(half).all()
    error = (half.float() - full)[real].norm() / full[real].norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_the_seed_sets_the_weights_and_features():
    first, same, other = (build(PerformerForMaskedLM, seed=seed).state_dict() for seed in (3, 3, 4))
    assert_same(first, same)
    drawn = [name for name in first if name.endswith("feature_map.weight")]
    assert len(drawn) == 2
    assert not any(torch.equal(first[name], other[name]) for name in (*drawn, "lm_head.weight"))


def test_initial_weights_have_their_scales():
    model = build(PerformerForMaskedLM, hidden_size=128, initializer_range=0.1, num_hidden_layers=8)
    layer = model.performer.layers[3]
    for weight, expected in (
        (model.performer.embeddings.weight[1:], 0.1),
        (layer.attention.query_key_value.weight, 0.1),
        (layer.mlp_input.weight, 0.1),
        (layer.attention.output.weight, 0.1 / 4),
        (layer.mlp_output.weight, 0.1 / 4),
    ):
        assert abs(weight.std() / expected - 1) < 0.05
    assert (model.performer.embeddings.weight[0] == 0).all()
    reference = SoftmaxFeatures(model.config.head_dim, 4096)
    drawn = layer.attention.mechanism.feature_map.weight
    assert abs(drawn.norm(dim=-1).mean() / reference.weight.norm(dim=-1).mean() - 1) < 0.1


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


OTHERS = ("exact", "favor-relu", "identity")


@pytest.mark.parametrize(
    "chunk", [0, pytest.param(6, marks=pytest.mark.exhaustive)], ids=["whole", "chunks"]
)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "name",
    ["favor-softmax", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in OTHERS)],
)
def test_compiled_without_graph_breaks(name, chunk):
    """Values and gradients of a masked language model with padding, in float32 as it is used."""
    options = {"chunk_size_feed_forward": chunk, "num_hidden_layers": 1}
    model = build(PerformerForMaskedLM, name, **options).train()
    ids, mask = right_padded(rows_of(20, 13))
    given = {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    eager = model(ids, **given)
    eager.loss.backward()
    expected, real = gradients(model), mask.bool()
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, **given)
    output.loss.backward()
    torch.testing.assert_close(output.logits[real], eager.logits[real], rtol=1e-5, atol=1e-5)
    assert_same(gradients(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_reversible_blocks():
    """With graph breaks."""
    model, ids = masked_model(reversible=True), tokens(2, 20)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    wanted = gradients(model)
    output = torch.compile(model, backend="aot_eager")(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, **TOLERANCE)
    assert_same(gradients(model), wanted, rtol=1e-5, atol=1e-7)
