"""A converted model against its original: forward passes and decoding."""

import copy
import json

import pytest
import torch
import transformers

from performers.benchmark.cases import convert, decode
from performers.benchmark.cases.convert import measure_decoding, measure_speed
from performers.benchmark.cases.decode import ModelDecoder
from performers.benchmark.memory import memory_is_measurable
from performers.benchmark.settings import Rounds, Sampling
from performers.convert import extend_positions_, to_performer
from tests.benchmark.tiny_models import bert_config, llama_config

QUICK = Sampling(repeats=2, min_time=0.0, memory=False)
ROUNDS = Rounds(repeats=2, min_time=0.0)
CONTEXTS = (80, 160)


def build(model_class, config):
    torch.manual_seed(0)
    return model_class(copy.deepcopy(config)).eval()


def pair(model_class, config, **options):
    """A model, and the same converted."""
    options = {"window": 4, "num_features": 8} | options
    generator = torch.Generator().manual_seed(0)
    converted = to_performer(build(model_class, config), generator=generator, **options)
    return build(model_class, config), converted


@pytest.fixture(scope="module")
def llamas():
    return pair(transformers.LlamaForCausalLM, llama_config(), sinks=2)


@pytest.fixture(scope="module")
def berts():
    config = bert_config(attention_probs_dropout_prob=0.0)
    return pair(transformers.BertForMaskedLM, config)


def test_both_models_run_on_the_same_lengths(berts):
    steps = []
    rows = measure_speed(
        *berts, (10, 40), sampling=QUICK, progress=lambda *state: steps.append(state)
    )
    assert [(row["length"], row["model"]) for row in rows] == [
        (10, "original"), (10, "converted"), (40, "original"), (40, "converted"),
    ]  # fmt: skip
    assert steps == [(1, 2), (2, 2)]
    for row in rows:
        assert row["status"] == "measured"
        assert row["seconds"] > 0
        assert row["peak_bytes"] is None
        times = {other["model"]: other["seconds"] for other in rows[:2]}
        if row["length"] == 10:
            assert row["original_ratio"] == pytest.approx(times["original"] / row["seconds"])
    json.dumps(rows)


def test_a_causal_model_computes_the_logits_of_the_last_token(llamas):
    for model in llamas:
        tokens = convert._tokens(model, 12, 0)
        output = convert.forward_call(model, tokens)()
        with torch.no_grad():
            full = model(input_ids=tokens).logits
        assert output.shape == (1, 1, 50)
        torch.testing.assert_close(output, full[:, -1:])


def test_no_token_is_padding(berts):
    tokens = convert._tokens(berts[0], 2000, 0)
    assert int((tokens == berts[0].config.pad_token_id).sum()) == 0
    assert 0 <= int(tokens.min()) < int(tokens.max()) < 25


def test_a_call_that_would_take_too_long_is_skipped(berts):
    sampling = Sampling(repeats=1, min_time=0.0, memory=False, max_seconds=1e-6)
    rows = measure_speed(*berts, (10, 40), sampling=sampling)
    assert [row["status"] for row in rows] == ["measured", "measured", "skipped", "skipped"]
    assert "predicted to take" in rows[2]["reason"]
    assert rows[3]["original_ratio"] is None


def test_outputs_that_are_not_finite_are_no_speed(berts, monkeypatch):
    original, broken = berts
    bias = broken.cls.predictions.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    rows = measure_speed(original, broken, (10,), sampling=QUICK)
    assert [row["status"] for row in rows] == ["measured", "failed"]
    assert "not finite" in rows[1]["reason"]
    assert rows[1]["seconds"] is None


@pytest.mark.exhaustive
@pytest.mark.skipif(not memory_is_measurable(), reason="memory is not measurable here")
def test_memory_is_that_of_the_saved_models(berts, tmp_path):
    """In processes of their own, where both are given as many positions as are asked for."""
    folders = tmp_path / "original", tmp_path / "converted"
    for model, place in zip(berts, folders, strict=True):
        model.save_pretrained(place)
    config = bert_config(attention_probs_dropout_prob=0.0, max_position_embeddings=601)
    longer = pair(transformers.BertForMaskedLM, config)
    sampling = Sampling(repeats=1, min_time=0.0, memory_max_length=600)
    rows = measure_speed(*longer, (600, 601), sampling=sampling, folders=folders)
    assert [row["status"] for row in rows] == ["measured"] * 4, rows
    assert all(row["peak_bytes"] > 0 for row in rows[:2])
    assert [row["peak_bytes"] for row in rows[2:]] == [None, None]


def test_decoding_weighs_the_cache_and_times_the_steps(llamas):
    steps = []
    rows = measure_decoding(
        *llamas, CONTEXTS, tokens=3, rounds=ROUNDS, progress=lambda *state: steps.append(state)
    )
    assert steps == [(1, 2), (2, 2)]
    assert [(row["context"], row["model"]) for row in rows] == [
        (80, "original"), (80, "converted"), (160, "original"), (160, "converted"),
    ]  # fmt: skip
    sizes = {(row["context"], row["model"]): row["cache_bytes"] for row in rows}
    # Keys and values of 3 layers with 2 heads of 8 floats.
    assert sizes[80, "original"] == 80 * 2 * 3 * 2 * 8 * 4
    assert sizes[160, "original"] == 2 * sizes[80, "original"]
    assert sizes[160, "converted"] == sizes[80, "converted"] < sizes[80, "original"]
    for row in rows:
        assert row["status"] == "measured"
        assert row["seconds"] > 0
        assert row["over_shortest_context"] > 0
    assert rows[0]["over_shortest_context"] == rows[1]["over_shortest_context"] == 1
    assert rows[3]["original_ratio"] == pytest.approx(rows[2]["seconds"] / rows[3]["seconds"])
    json.dumps(rows)


def decoders(model):
    """Decoders of a model after both contexts, with all tokens that each has read."""
    reader, read = ModelDecoder(model, 2, 0), []
    draw = reader._draw
    reader._draw = lambda length: read.append(draw(length)) or read[-1]
    for context in CONTEXTS:
        reader.extend(context)
        decoder = reader.fork()
        decoder.tokens = torch.cat([*read, decoder._token], dim=1)
        yield decoder


@pytest.mark.parametrize("index", [0, 1])
def test_a_step_is_the_next_row_of_the_whole_sequence(llamas, index, monkeypatch):
    monkeypatch.setattr(decode, "_MODEL_PREFILL", 50)
    model = llamas[index]
    for decoder, context in zip(decoders(model), CONTEXTS, strict=True):
        assert decoder.tokens.shape == (2, context + 1)
        with torch.no_grad():
            expected = model(input_ids=decoder.tokens, use_cache=False).logits[:, -1:]
        (step,) = decoder.steps(1)
        torch.testing.assert_close(step, expected, atol=1e-4, rtol=1e-4)


def test_steps_of_exact_attention_are_taken_back(llamas):
    decoder = next(decoders(llamas[0]))
    first, second = decoder.steps(2)
    torch.testing.assert_close([*decoder.steps(2)], [first, second])


def test_the_original_repeats_the_keys_that_it_has_read(llamas, monkeypatch):
    monkeypatch.setattr(decode, "_REALLY_READ", 7)
    decoder = ModelDecoder(llamas[0], 1, 0, repeat=True)
    decoder.extend(80)
    size = decoder.nbytes
    for layer in decoder._cache.layers:
        assert layer.keys.shape[2] == 80
        for position in range(80):
            assert torch.equal(layer.keys[:, :, position], layer.keys[:, :, position % 7])
    decoder.extend(160)
    assert decoder.nbytes == 2 * size


def test_a_hybrid_keeps_keys_where_it_is_exact():
    models = pair(transformers.LlamaForCausalLM, llama_config(), layers=[0, 2])
    rows = measure_decoding(*models, CONTEXTS, tokens=2, rounds=ROUNDS)
    sizes = {(row["context"], row["model"]): row["cache_bytes"] for row in rows}
    grown = sizes[160, "converted"] - sizes[80, "converted"]
    assert grown == (sizes[160, "original"] - sizes[80, "original"]) / 3
    assert {row["status"] for row in rows} == {"measured"}


def test_lengths_and_contexts_beyond_the_table_of_positions():
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=90, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    models = pair(transformers.GPT2LMHeadModel, config)
    with pytest.raises(ValueError, match=r"reach 96, and the original model has 90 positions"):
        measure_speed(*models, (16, 96), sampling=QUICK)
    with pytest.raises(ValueError, match=r"reach 80, and the original model has 90 positions"):
        measure_decoding(*models, (80,), tokens=16, rounds=ROUNDS)
    for model in models:
        extend_positions_(model, 200)
    assert len(measure_speed(*models, (16, 96), sampling=QUICK)) == 4
    with pytest.raises(ValueError, match="lengths must be"):
        measure_speed(*models, (96, 16), sampling=QUICK)
    rows = measure_decoding(*models, (80,), tokens=4, rounds=ROUNDS)
    assert {row["status"] for row in rows} == {"measured"}
