"""Tables of positions made longer."""

import pytest
import torch
import transformers

from performers.convert import extend_positions_, load_performer, to_performer
from performers.convert.interface.positions import learned_positions
from performers.models import PerformerConfig, PerformerForMaskedLM

OLD, NEW = 20, 53
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.5,
}
GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": OLD}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, SIZES, OLD),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig, SIZES, OLD + 2),
    "electra": (transformers.ElectraModel, transformers.ElectraConfig, SIZES, OLD),
    "distilbert": (
        transformers.DistilBertForMaskedLM,
        transformers.DistilBertConfig,
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16},
        OLD,
    ),
    "esm": (
        transformers.EsmForMaskedLM,
        transformers.EsmConfig,
        SIZES | {"position_embedding_type": "absolute", "pad_token_id": 1},
        OLD + 2,
    ),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT | TOKENS, OLD),
    "gpt_neo": (
        transformers.GPTNeoForCausalLM,
        transformers.GPTNeoConfig,
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            **TOKENS,
        },
        OLD,
    ),
    "opt": (
        transformers.OPTForCausalLM,
        transformers.OPTConfig,
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 16,
        },
        OLD,
    ),
    "performer": (
        PerformerForMaskedLM,
        PerformerConfig,
        SIZES | {"position_embedding": "learned", "attention": "exact"},
        OLD,
    ),
}


def build(family):
    model_class, config_class, options, positions = FAMILIES[family]
    if "n_positions" not in options:
        options = options | {"max_position_embeddings": positions}
    torch.manual_seed(0)
    return model_class(config_class(**options)).eval()


def ids(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 40, (2, length), generator=generator)


def run(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens)[0]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_longer_inputs_become_possible_and_short_ones_stay_as_they_were(family, tmp_path):
    model = build(family)
    assert learned_positions(model) == OLD
    before = run(model, ids(OLD))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(model, ids(NEW))
    assert extend_positions_(model, NEW) is model
    assert learned_positions(model) == NEW
    torch.testing.assert_close(run(model, ids(OLD)), before, rtol=0, atol=0)
    long = run(model, ids(NEW))
    assert long.shape[1] == NEW
    assert torch.isfinite(long).all()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert learned_positions(again) == NEW
    torch.testing.assert_close(run(again, ids(NEW)), long)


def table_of(model):
    names = ("position_embeddings", "embed_positions", "wpe", "positions")
    return next(
        module for name, module in model.named_modules() if name.split(".")[-1] in names
    ).weight


@pytest.mark.parametrize(("family", "first"), [("bert", 0), ("roberta", 2), ("opt", 2)])
def test_the_trained_rows_are_repeated(family, first):
    model = build(family)
    trained = table_of(model).detach().clone()
    extend_positions_(model, NEW)
    table = table_of(model)
    assert table.requires_grad
    assert torch.equal(table[:first], trained[:first])
    for position in range(NEW):
        assert torch.equal(table[first + position], trained[first + position % OLD])


def test_gpt_neos_local_layers_stay_local():
    model = build("gpt_neo")
    masks = [block.attn.attention.bias for block in model.transformer.h]
    extend_positions_(model, NEW)
    for block, before, reach in zip(model.transformer.h, masks, (NEW, 4), strict=True):
        mask = block.attn.attention.bias
        assert mask.shape == (1, 1, NEW, NEW)
        assert torch.equal(mask[..., :OLD, :OLD], before)
        assert mask[0, 0].sum(-1).tolist() == [min(row + 1, reach) for row in range(NEW)]


def test_a_converted_model_reads_on_and_is_loaded_again(tmp_path):
    model = to_performer(build("bert"), window=6, generator=torch.Generator().manual_seed(0))
    before = run(model, ids(OLD))
    extend_positions_(model, NEW)
    torch.testing.assert_close(run(model, ids(OLD)), before)
    model.save_pretrained(tmp_path)
    again = load_performer(tmp_path)
    torch.testing.assert_close(run(again, ids(NEW)), run(model, ids(NEW)))


def test_models_without_a_table_need_nothing():
    config = transformers.LlamaConfig(**SIZES, **TOKENS)
    model = transformers.LlamaForCausalLM(config)
    limit = config.max_position_embeddings
    assert learned_positions(model) is None
    assert extend_positions_(model, 100_000) is model
    assert config.max_position_embeddings == limit


def test_a_table_that_is_long_enough_is_left_alone():
    model = build("bert")
    table = table_of(model)
    extend_positions_(model, OLD)
    assert table_of(model) is table


def test_what_cannot_be_extended():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        extend_positions_(build("bert"), 0)
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="ViTModel has positions of an image"):
        extend_positions_(transformers.ViTModel(vit), 100)
    config = transformers.DistilBertConfig(
        **FAMILIES["distilbert"][2], max_position_embeddings=OLD, sinusoidal_pos_embds=True
    )
    with pytest.raises(ValueError, match="has sinusoidal positions"):
        extend_positions_(transformers.DistilBertModel(config), NEW)
    bart = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="BartModel is an encoder-decoder"):
        extend_positions_(transformers.BartModel(bart), 2000)
