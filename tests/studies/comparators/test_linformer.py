"""Linformer against its formula, its initial weights, and what it refuses."""

import pytest
import torch

from performers.models.context import AttentionContext
from tests.models.cases import tokens
from tests.studies.comparators.oracle import (
    compare,
    contexts,
    inputs,
    make_config,
    make_mechanism,
    make_model,
    rows,
)


def formula(module, query, key, value, context):
    """Row by row, over the tokens that are not masked, as if there were no others."""
    out = torch.zeros_like(value)
    weights = query.new_zeros(*query.shape[:3], query.shape[2])
    for row, places in rows(context, query.shape[2]):
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
    module = make_mechanism("linformer", rank=5)
    tensors = inputs(length)
    for context in contexts(length):
        if not context.is_causal and context.sequence_ids is None:
            compare(module, tensors, context, formula(module, *tensors, context))


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
        make_mechanism("linformer")(*inputs(4), AttentionContext(is_causal=True), 0)
