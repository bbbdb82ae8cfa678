"""Tables of positions made longer."""

import pytest
import torch

from performers.convert import extend_positions_, load_performer
from tests.convert.models import build, converted, output, performer, small, token_ids

OLD, NEW = 20, 53
SIZE = {"max_position_embeddings": OLD}
BEYOND = {"max_position_embeddings": OLD + 2}
# Model, its table, and the first row of the table that is a position.
TABLES = {
    "bert": (lambda: build("bert", **SIZE), "position_embeddings", 0),
    "roberta": (lambda: build("roberta", **BEYOND), "position_embeddings", 2),
    "electra": (lambda: build("electra", **SIZE), "position_embeddings", 0),
    "distilbert": (lambda: build("distilbert", **SIZE), "position_embeddings", 0),
    "esm": (
        lambda: build("esm", position_embedding_type="absolute", **BEYOND),
        "position_embeddings",
        2,
    ),
    "gpt2": (lambda: build("gpt2", n_positions=OLD), "wpe", 0),
    "gpt_neo": (
        lambda: small(
            "GPTNeoForCausalLM", **SIZE, window_size=4, attention_types=[[["global", "local"], 1]]
        ),
        "wpe",
        0,
    ),
    "opt": (lambda: build("opt", **SIZE), "embed_positions", 2),
    "performer": (lambda: performer(position_embedding="learned", **SIZE), "positions", 0),
    "converted": (lambda: converted(build("bert", **SIZE), window=6), "position_embeddings", 0),
}


def table_of(model, table):
    return next(x for name, x in model.named_modules() if name.endswith(table)).weight


def run(model, length):
    return output(model, {"input_ids": token_ids(2, length)})


@pytest.mark.parametrize("name", TABLES)
def test_longer_inputs_become_possible_and_short_ones_stay_as_they_were(name, tmp_path):
    make, table, first = TABLES[name]
    model = make()
    before, trained = run(model, OLD), table_of(model, table).detach().clone()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(model, NEW)
    assert extend_positions_(model, NEW) is model
    assert torch.equal(run(model, OLD), before)
    # The trained rows are repeated.
    extended = table_of(model, table)
    assert extended.requires_grad
    assert torch.equal(extended[:first], trained[:first])
    assert torch.equal(extended[first:], trained[first:].repeat(3, 1)[:NEW])
    long = run(model, NEW)
    assert long.shape[1] == NEW
    assert long.isfinite().all()
    model.save_pretrained(tmp_path)
    again = (
        load_performer(tmp_path) if name == "converted" else type(model).from_pretrained(tmp_path)
    )
    torch.testing.assert_close(run(again.eval(), NEW), long)
    # Long enough now.
    extend_positions_(model, OLD)
    assert table_of(model, table) is extended


def test_gpt_neos_local_layers_stay_local():
    model = TABLES["gpt_neo"][0]()
    masks = [block.attn.attention.bias for block in model.transformer.h]
    extend_positions_(model, NEW)
    for block, before, reach in zip(model.transformer.h, masks, (NEW, 4), strict=True):
        mask = block.attn.attention.bias
        assert mask.shape == (1, 1, NEW, NEW)
        assert torch.equal(mask[..., :OLD, :OLD], before)
        assert mask[0, 0].sum(-1).tolist() == [min(row + 1, reach) for row in range(NEW)]


def test_models_without_a_table_need_nothing():
    model = build("llama")
    limit = model.config.max_position_embeddings
    assert extend_positions_(model, 100_000) is model
    assert model.config.max_position_embeddings == limit


@pytest.mark.parametrize(
    ("make", "length", "words"),
    [
        (lambda: build("bert"), 0, "length must be at least 1, got 0"),
        (lambda: build("vit"), 100, "ViTModel has positions of an image"),
        (
            lambda: small("DistilBertModel", sinusoidal_pos_embds=True),
            1000,
            "has sinusoidal positions",
        ),
        (lambda: small("BartModel"), 2000, "BartModel is an encoder-decoder"),
        (
            lambda: performer(position_embedding="axial", axial_shape=(8, 16)),
            256,
            "positions of a grid",
        ),
    ],
)
def test_what_cannot_be_extended(make, length, words):
    with pytest.raises(ValueError, match=words):
        extend_positions_(make(), length)
