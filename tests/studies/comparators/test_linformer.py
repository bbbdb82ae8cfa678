"""Linformer against its formula, its initial weights, and what it refuses."""

import pytest
import torch

from performers.models import PerformerForMaskedLM
from performers.models.context import AttentionContext
from studies.comparators import LinformerMechanism
from tests.models.cases import tokens
from tests.studies.comparators.oracle import (
    compare,
    contexts,
    inputs,
    make_config,
    make_model,
    rows,
)


def mechanism(rank=5, max_length=40):
    torch.manual_seed(0)
    return LinformerMechanism(rank, max_length).double()


def formula(module, query, key, value, context):
    """Row by row, over the tokens that are not masked, as if there were no others."""
    out = torch.zeros_like(value)
    weights = query.new_zeros(*query.shape[:3], query.shape[2])
    for row, places in rows(context, *query.shape[:3:2]):
        left = module.key_projection[:, : len(places)]
        right = module.value_projection[:, : len(places)]
        for head in range(query.shape[1]):
            q, k, v = (x[row, head][places] for x in (query, key, value))
            shares = (q @ (left @ k).T / query.shape[-1] ** 0.5).softmax(-1)
            index = torch.tensor(places)
            out = out.index_put((torch.tensor(row), torch.tensor(head), index), shares @ right @ v)
            weights[row, head, index[:, None], index] = (shares @ right).detach()
    return out, weights


@pytest.mark.parametrize("length", [1, 7, 40])
def test_the_formula(length):
    module = mechanism()
    tensors = inputs(length)
    for context in contexts(length, causal=[False], packed=[False]):
        out, weights = formula(module, *tensors, context)
        shown = module(*tensors, context, 0)[1].detach()
        torch.testing.assert_close(shown, weights, rtol=1e-9, atol=1e-11)
        compare(module, tensors, context, (out, module(*tensors, context, 0)[1]))


def test_a_padded_row_may_be_longer_than_the_table():
    module = mechanism(max_length=9)
    tensors = inputs(30)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 20:29] = mask[1, ::4] = True
    context = AttentionContext(is_causal=False, key_mask=mask, need_weights=True)
    out, weights = module(*tensors, context, 0)
    expected, matrix = formula(module, *tensors, context)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weights, matrix, rtol=1e-9, atol=1e-11)


def test_longer_inputs_are_refused():
    model = make_model("linformer", max_position_embeddings=12)
    ids = tokens(2, 13)
    with pytest.raises(ValueError, match=r"13 tokens .* at most 12.*max_position_embeddings"):
        model(ids)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    assert torch.isfinite(model(ids, attention_mask=mask).logits).all()
    assert model.config.longest_input == 12
    assert make_config("lsh").longest_input is None
    assert make_config("exact", position_embedding="learned").longest_input == 128
    mask[0, 0] = 1
    with pytest.raises(ValueError, match="13 tokens"):
        model(ids, attention_mask=mask)


def test_packed_rows_and_causal_models_are_refused():
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match=r"packed sequences apart.*attention_mask"):
        make_model("linformer")(ids, sequence_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="no causal form"):
        mechanism()(*inputs(4), AttentionContext(is_causal=True), 0)


def test_initial_projections_and_a_checkpoint_without_them(tmp_path):
    torch.manual_seed(0)
    config = make_config("linformer", {"rank": 16}, max_position_embeddings=400)
    model = PerformerForMaskedLM(config)
    modules = [layer.attention.mechanism for layer in model.performer.layers]
    drawn = [p for module in modules for p in module.parameters()]
    assert len({p.sum().item() for p in drawn}) == 4
    for projection in drawn:
        assert projection.shape == (16, 400)
        assert abs(projection.std().item() * 4 - 1) < 0.05
    model.save_pretrained(tmp_path / "whole")
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path / "whole")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    exact = PerformerForMaskedLM(make_config("exact", max_position_embeddings=400))
    exact.save_pretrained(tmp_path / "exact")
    started = PerformerForMaskedLM.from_pretrained(tmp_path / "exact", config=config)
    for layer in started.performer.layers:
        for projection in layer.attention.mechanism.parameters():
            assert abs(projection.std().item() * 4 - 1) < 0.05
