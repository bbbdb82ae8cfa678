"""What a forward call returns, for every mechanism and kind of position."""

import math

import pytest
import torch
from torch import nn

from performers.models import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerModel,
)
from performers.models.arguments import CACHE_KEYWORD
from performers.models.positions import rotate
from tests.models.cases import (
    EVERY,
    FULL,
    MAIN,
    POSITION_NAMES,
    TOLERANCE,
    VOCABULARY,
    causal_model,
    make_config,
    make_model,
    masked_model,
    right_padded,
    tokens,
)

LENGTHS = (9, 6)


@pytest.mark.parametrize("positions", POSITION_NAMES)
@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_forward_and_backward(attention, positions, is_causal):
    model = make_model(attention, is_causal, position_embedding=positions).train()
    ids = tokens(2, 9)
    output = model(ids, labels=ids)
    assert output.logits.shape == (2, 9, VOCABULARY)
    assert torch.isfinite(output.logits).all()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    moved = {name for name, p in model.named_parameters() if p.grad.abs().max() > 0}
    assert moved == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("positions", POSITION_NAMES)
@pytest.mark.parametrize("attention", [name for name in FULL if name != "identity"])
def test_positions_are_seen(attention, positions):
    """Swapping two tokens does more than swap their outputs."""
    model = masked_model(attention, position_embedding=positions)
    ids = tokens(1, 8)
    swapped = ids[:, [0, 1, 5, 3, 4, 2, 6, 7]]
    before, after = (model(x).logits for x in (ids, swapped))
    assert (before[:, 2] - after[:, 5]).abs().max() > 1e-3
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-6


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_position_ids_are_used(positions):
    model = masked_model(position_embedding=positions)
    ids = tokens(1, 6)
    plain = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=torch.arange(6)[None]).logits, plain)
    assert (model(ids, position_ids=torch.arange(3, 9)[None]).logits - plain).abs().max() > 1e-3


def test_rotary_softmax_attention_depends_on_distances_only():
    model = masked_model("exact")
    ids = tokens(1, 6)
    moved = model(ids, position_ids=torch.arange(40, 46)[None]).logits
    torch.testing.assert_close(moved, model(ids).logits, rtol=1e-4, atol=1e-4)
    stretched = model(ids, position_ids=3 * torch.arange(6)[None]).logits
    assert (stretched - model(ids).logits).abs().max() > 1e-3


def test_rotation_keeps_lengths_and_double_precision():
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    angle = torch.rand(1, 1, 5, 4, dtype=torch.float64)
    rotated = rotate(x, (angle.cos(), angle.sin()))
    assert rotated.dtype == torch.float64
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("model_class", "names"),
    [
        (PerformerModel, ["last_hidden_state"]),
        (PerformerForMaskedLM, ["loss", "logits"]),
        (PerformerForCausalLM, ["loss", "logits", CACHE_KEYWORD]),
        (PerformerForSequenceClassification, ["loss", "logits"]),
    ],
)
def test_dictionaries_and_tuples(model_class, names):
    torch.manual_seed(0)
    model = model_class(make_config()).eval()
    options = {"output_attentions": True, "output_hidden_states": True}
    if "loss" in names:
        shape = (2,) if model_class is PerformerForSequenceClassification else (2, 7)
        options["labels"] = torch.ones(shape, dtype=torch.long)
    ids = tokens(2, 7)
    output = model(ids, **options)
    assert list(output.keys()) == [*names, "hidden_states", "attentions"]
    as_tuple = model(ids, **options, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(output.keys())
    for name, value in zip(output.keys(), as_tuple, strict=True):
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, output[name], rtol=0, atol=0)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


@pytest.mark.parametrize("attention", MAIN)
def test_hidden_states(attention):
    model = masked_model(attention)
    output = model(tokens(2, 7), output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(state.shape == (2, 7, 32) for state in output.hidden_states)
    embedded = model.performer.embeddings(tokens(2, 7))
    torch.testing.assert_close(output.hidden_states[0], embedded)
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(tokens(2, 7)).hidden_states is None


@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_attention_matrices(attention, is_causal):
    """Their rows sum to one over real keys, and they are what the layers did."""
    model = make_model(attention, is_causal)
    ids, mask = right_padded([row[:n] for row, n in zip(tokens(2, 9), LENGTHS, strict=True)])
    results = []

    def record(module, args, result):
        results.append((args[2], result))

    layers = model.performer.layers
    hooks = [layer.attention.mechanism.register_forward_hook(record) for layer in layers]
    plain = model(ids, attention_mask=mask, use_cache=False)
    shown = model(ids, attention_mask=mask, use_cache=False, output_attentions=True)
    for hook in hooks:
        hook.remove()
    real = mask.bool()
    torch.testing.assert_close(shown.logits[real], plain.logits[real], **TOLERANCE)
    assert plain.attentions is None
    assert len(shown.attentions) == len(layers)
    for (value, (out, _)), weights in zip(results[: len(layers)], shown.attentions, strict=True):
        assert weights.shape == (2, 2, 9, 9)
        rows = weights.transpose(1, 2)[real]
        torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), **TOLERANCE)
        if attention != "identity":
            assert (weights.permute(0, 3, 1, 2)[~real] == 0).all()
        if is_causal:
            assert (weights.triu(1) == 0).all()
        attended = (weights @ value).transpose(1, 2)
        torch.testing.assert_close(attended[real], out.transpose(1, 2)[real], **TOLERANCE)


def test_identity_layers_attend_to_themselves():
    output = masked_model("identity")(tokens(2, 5), output_attentions=True)
    for weights in output.attentions:
        assert (weights == torch.eye(5, dtype=weights.dtype)).all()


@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_the_first_loss_is_that_of_guessing(attention, is_causal):
    """With the ordinary initial weights; one drawn model in float32."""
    torch.manual_seed(0)
    model_class = PerformerForCausalLM if is_causal else PerformerForMaskedLM
    model = model_class(make_config(attention, initializer_range=0.02, hidden_size=64))
    ids = tokens(8, 40)
    # A tied output layer knows the input token, so predict others.
    loss = model(ids, labels=tokens(8, 40, seed=1)).loss
    assert loss.dtype == torch.float32
    assert abs(loss.item() - math.log(VOCABULARY)) < 0.1


def test_masked_loss_is_the_mean_over_labelled_tokens():
    model = masked_model()
    ids = tokens(2, 9)
    labels = torch.full_like(ids, -100)
    labels[0, 3], labels[1, 5], labels[1, 8] = 7, 8, 9
    output = model(ids, labels=labels)
    chosen = labels != -100
    expected = nn.functional.cross_entropy(output.logits[chosen], labels[chosen])
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)


def test_causal_loss_is_that_of_the_next_token():
    model = causal_model()
    ids = tokens(2, 9)
    output = model(ids, labels=ids.index_fill(1, torch.tensor([4]), -100))
    keep = [0, 1, 2, 4, 5, 6, 7]
    expected = nn.functional.cross_entropy(
        output.logits[:, keep].flatten(0, 1), ids[:, [i + 1 for i in keep]].flatten()
    )
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=0)


def test_logits_of_the_last_tokens_only():
    model = causal_model()
    ids = tokens(2, 9)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(
        model(ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, ::4][:, :2]
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_embeddings_in_place_of_ids(is_causal):
    model = make_model("favor-softmax", is_causal)
    ids = tokens(2, 9)
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embedded)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", MAIN)
def test_half_precision_stays_near_full_precision(attention, dtype):
    torch.manual_seed(0)
    model = PerformerForMaskedLM(make_config(attention)).eval()
    ids, mask = right_padded([row[:n] for row, n in zip(tokens(2, 40), (40, 21), strict=True)])
    full = model(ids, attention_mask=mask).logits
    half = model.to(dtype)(ids, attention_mask=mask).logits
    assert half.dtype == dtype
    real = mask.bool()
    assert torch.isfinite(half).all()
    error = (half.float() - full)[real].norm() / full[real].norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
