"""``generate()`` of converted decoders."""

import threading

import pytest
import torch
from transformers import set_seed

from tests.convert.architectures import (
    DECODERS,
    build,
    converted,
    generation_inputs,
    padding_mask,
    token_ids,
)
from tests.convert.decoding import GENERATORS, KINDS, NEW, decoder, sequences, states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GENERATORS)
def test_greedy_decoding_with_and_without_a_cache(name, kind):
    model, given = decoder(name, kind), generation_inputs(name)
    expected = sequences(model, given, use_cache=False)
    assert torch.equal(sequences(model, given), expected)
    assert len(expected[:, -NEW:].unique()) >= 3


@pytest.mark.parametrize("name", GENERATORS)
def test_a_covering_window_generates_what_the_original_does(name):
    given = generation_inputs(name)
    model = converted(build(name), window=64)
    assert torch.equal(sequences(model, given), sequences(build(name), given))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "whisper"])
def test_sampling_with_and_without_a_cache(name):
    model, given = decoder(name), generation_inputs(name)
    runs = []
    for use_cache in (True, False):
        set_seed(3)
        runs.append(sequences(model, given, do_sample=True, top_k=8, use_cache=use_cache))
    assert torch.equal(*runs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3", "bart", "whisper"])
def test_beams_with_and_without_a_cache(name, count):
    model, given = decoder(name), generation_inputs(name)
    options = {"num_beams": 3, "num_return_sequences": count}
    cached = sequences(model, given, **options)
    assert torch.equal(cached, sequences(model, given, **options, use_cache=False))
    assert len(cached) == 2 * count


def test_several_samples_of_each_prompt():
    model, given = decoder(), generation_inputs("llama")
    options = {"num_return_sequences": 3, "do_sample": True}
    set_seed(1)
    cached = sequences(model, given, **options)
    set_seed(1)
    assert torch.equal(cached, sequences(model, given, **options, use_cache=False))
    assert len(cached.unique(dim=0)) == 6


@pytest.mark.parametrize("name", [x for x in DECODERS if x != "bert_decoder"])
def test_left_padded_batches_equal_rows_alone(name):
    model, ids = decoder(name), token_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :11] = 0, 0
    together = sequences(model, {"input_ids": ids, "attention_mask": mask})
    for row, padding in enumerate((0, 5, 11)):
        alone = sequences(model, {"input_ids": ids[row : row + 1, padding:]})
        assert torch.equal(together[row : row + 1, padding:], alone)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_prompt_continued_over_several_calls(name):
    model, ids = decoder(name), token_ids(2, 12)
    mask = padding_mask(2, 12, "left", 5)
    cache = None
    for call in range(3):
        given = {"input_ids": ids, "attention_mask": mask}
        fresh = sequences(model, given)
        result = sequences(model, given, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(result.sequences, fresh)
        cache = result.past_key_values
        assert cache.get_seq_length() == fresh.shape[1] - 1
        ids = torch.cat((fresh, token_ids(2, 4, seed=call)), 1)
        mask = torch.cat((mask, mask.new_ones(2, NEW + 4)), 1)


def test_a_prompt_read_in_chunks():
    model, given = decoder(), generation_inputs("llama", length=23)
    assert torch.equal(sequences(model, given, prefill_chunk_size=5), sequences(model, given))


@pytest.mark.parametrize("layers", [[0], [-1]])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_hybrids_of_linear_and_exact_layers(name, layers):
    model, ids = decoder(name, layers=layers), token_ids(2, 12)
    mask = padding_mask(2, 12, "left", 5)
    given = {"input_ids": ids, "attention_mask": mask}
    result = sequences(model, given, return_dict_in_generate=True)
    assert torch.equal(result.sequences, sequences(model, given, use_cache=False))
    assert len(states(result.past_key_values)) == 1
    alone = sequences(model, {"input_ids": ids[1:, 5:]})
    assert torch.equal(result.sequences[1:, 5:], alone)


def test_threads_that_generate_with_one_model_do_not_disturb_each_other():
    model = decoder()
    prompts = [generation_inputs("llama", rows=1 + i, length=6 + 3 * i, seed=i) for i in range(4)]
    alone = [sequences(model, given) for given in prompts]
    results = [[] for _ in prompts]

    def run(place):
        for _ in range(5):
            results[place].append(sequences(model, prompts[place]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, expected in enumerate(alone):
        assert len(results[place]) == 5
        assert all(torch.equal(got, expected) for got in results[place])


def test_cross_attention_that_is_linear_too():
    model = converted(build("bart"), num_features=32, window=4, cross_attention=True)
    given = generation_inputs("bart")
    given["attention_mask"] = padding_mask(2, 12, "right", 4)
    for options in ({}, {"num_beams": 3}):
        cached = sequences(model, given, **options)
        assert torch.equal(cached, sequences(model, given, **options, use_cache=False))
    alone = sequences(model, {"input_ids": given["input_ids"][1:, :8]})
    assert torch.equal(sequences(model, given)[1:], alone)
