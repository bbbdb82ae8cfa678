"""The past of a converted decoder: constant in size, inside transformers' cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from performers.convert.interface.masks import AttentionPattern
from tests.convert.architectures import (
    DECODERS,
    build,
    converted,
    generation_inputs,
    inputs,
    output,
    token_ids,
)
from tests.convert.decoding import KINDS, decoder, sequences, states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DECODERS)
def test_full_pass_chunks_and_steps_give_the_same_logits(name, kind):
    model, ids = decoder(name, kind), token_ids(2, 24)
    full = output(model, {"input_ids": ids}, use_cache=False)
    for sizes in ([24], [9, 1, 6, 8], [1] * 24):
        cache, chunks = DynamicCache(config=model.config), []
        for chunk in ids.split(sizes, 1):
            with torch.no_grad():
                result = model(chunk, past_key_values=cache, use_cache=True)
            chunks.append(result.logits)
        torch.testing.assert_close(torch.cat(chunks, 1), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper"])
def test_the_cache_is_as_large_after_200_tokens_as_after_20(name, kind):
    options = {"max_target_positions": 256} if name == "whisper" else {}
    model = converted(build(name, **options), **KINDS[kind])
    sizes = []
    for count in (20, 200):
        result = (
            sequences(
                model, generation_inputs(name), max_new_tokens=count, return_dict_in_generate=True
            )
            if name != "whisper"
            else _steps(model, count)
        )
        layers = states(result.past_key_values)
        assert len(layers) == 2
        sizes.append([layer.nbytes for layer in layers])
    assert sizes[0] == sizes[1]
    config = model.config
    heads = getattr(config, "num_key_value_heads", 4)
    # Float32: the sums and two numbers a feature; keys and values in the window and of the sinks,
    # and the masks of a byte each.
    kept = KINDS[kind].get("window", 0) + KINDS[kind].get("sinks", 0)
    assert sizes[0][0] == 2 * (heads * (16 * (8 + 2) + kept * 2 * 8) * 4 + kept)


def _steps(model, count):
    given = inputs("whisper")
    given["decoder_input_ids"] = token_ids(2, count)
    with torch.no_grad():
        return model(**given, use_cache=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_cache_can_be_repeated_selected_and_reordered(kind):
    model, ids = decoder(kind=kind), token_ids(3, 12)
    following = token_ids(6, 4, seed=1)

    def continued(change, rows):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            change(cache)
            got = model(following[: len(rows)], past_key_values=cache).logits
        whole = torch.cat((ids[rows], following[: len(rows)]), 1)
        expected = output(model, {"input_ids": whole}, use_cache=False)[:, 12:]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)

    continued(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    continued(lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0])
    continued(lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0])


def test_a_reset_cache_is_empty():
    model, ids = decoder(), token_ids(2, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, first)


def test_another_number_of_rows_is_refused():
    model = decoder()
    with torch.no_grad():
        cache = model(token_ids(2, 9)).past_key_values
    with pytest.raises(ValueError, match="state must have"):
        model(token_ids(1, 3), past_key_values=cache)


def test_rolling_back_is_refused():
    model, given = decoder(), generation_inputs("llama", rows=1)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        sequences(model, given, assistant_model=build("llama", seed=1))
    with pytest.raises(ValueError, match="not supported with stateful models"):
        sequences(model, given, prompt_lookup_num_tokens=2, max_new_tokens=40)


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_a_cache_of_fixed_length_is_refused(name):
    with pytest.raises(ValueError, match="leave cache_implementation at its default"):
        sequences(decoder(name), generation_inputs(name), cache_implementation="static")


def test_other_caches_are_refused():
    model, ids = decoder(), token_ids(2, 6)
    static = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match="StaticLayer"):
        model(ids, past_key_values=static)
    moving = DynamicCache(config=model.config)
    moving.offloading = True
    with pytest.raises(ValueError, match="offloading"):
        model(ids, past_key_values=moving)


def test_a_past_that_another_model_read_is_refused():
    original, ids = build("llama"), token_ids(2, 6)
    with torch.no_grad():
        cache = original(ids).past_key_values
    with pytest.raises(ValueError, match="holds 6 keys and values that another model computed"):
        decoder()(ids, past_key_values=cache)


def test_a_past_of_linear_attention_is_refused_by_exact_attention():
    model, ids = decoder(), token_ids(2, 6)
    with torch.no_grad():
        cache = model(ids).past_key_values
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="no other attention can continue"):
        model(ids, past_key_values=cache)


def test_packed_sequences_and_a_cache_are_refused():
    sequences = torch.tensor([[0, 0, 0, 1, 1, 1]])
    pattern = AttentionPattern(is_causal=True, sequence_ids=sequences, shape=(1, 1, 6, 6))
    with pytest.raises(ValueError, match="a cache together with packed sequences"):
        decoder()(token_ids(1, 6), attention_mask=pattern, use_cache=True)


def test_a_failed_call_leaves_no_layer_behind():
    model, ids = decoder(), token_ids(2, 6)
    expected = output(model, {"input_ids": ids}, use_cache=False)
    with pytest.raises(ValueError, match="mask of shape"):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool), use_cache=True)
    assert torch.equal(output(model, {"input_ids": ids}, use_cache=False), expected)
