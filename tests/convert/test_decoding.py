"""Decoding with converted models: a past of constant size inside transformers' cache."""

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache, set_seed

from performers import FavorState
from performers.models.arguments import CACHE_KEYWORD
from tests.convert.models import (
    CAUSAL,
    COVERING,
    DECODERS,
    GENERATORS,
    HEAD_DIM,
    KINDS,
    build,
    favors,
    generation_inputs,
    inputs,
    linear,
    output,
    padding_mask,
    step,
    token_ids,
    tried,
)

NEW = 10
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def decoder(name="llama", kind="exact terms", **changes):
    """A model that tests share and leave as it is."""
    return linear(name, **KINDS[kind], **changes)


def generate(model, given, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**given, **options)


def result_of(model, given, **options):
    """Tokens and cache."""
    result = generate(model, given, return_dict_in_generate=True, **options)
    return result.sequences, getattr(result, CACHE_KEYWORD)


def states(cache):
    """The layers of a cache that hold sums in the place of keys and values."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    return [x for x in layers if isinstance(getattr(x, "state", None), FavorState)]


def logits(model, ids, **options):
    return output(model, {"input_ids": ids}, use_cache=False, **options)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "exact terms") for name in CAUSAL),
        *((name, "features") for name in ("llama", "gpt2", "performer_causal")),
    ],
)
def test_full_pass_chunks_and_steps_give_the_same_logits(name, kind):
    model, ids = decoder(name, kind), token_ids(2, 24)
    full = logits(model, ids)
    for sizes in ([24], [9, 1, 6, 8], [1] * 24):
        cache, chunks = DynamicCache(config=model.config), []
        if name == "performer_causal":
            cache = None
        for chunk in ids.split(sizes, 1):
            part, cache = step(model, chunk, cache)
            chunks.append(part)
        torch.testing.assert_close(torch.cat(chunks, 1), full, **CLOSE)
    # The last token sees the first.
    changed = logits(model, torch.cat((ids[:, :1] % 64 + 6, ids[:, 1:]), 1))
    assert (changed - full)[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_greedy_decoding_with_and_without_a_cache(name, kind):
    model, given = decoder(name, kind), generation_inputs(name)
    expected = generate(model, given, use_cache=False)
    assert torch.equal(generate(model, given), expected)
    assert len(expected[:, -NEW:].unique()) >= 2


@pytest.mark.parametrize("name", [*GENERATORS, "llava"])
def test_a_covering_window_generates_what_the_original_does(name):
    # A second image without pixels would be refused.
    model, options = build(name), {"suppress_tokens": [98]} if name == "llava" else {}
    given, exact = generation_inputs(name), linear(name, window=COVERING)
    assert torch.equal(generate(exact, given, **options), generate(model, given, **options))


WAYS = {
    "sampling": {"do_sample": True, "top_k": 8},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("gpt2", "gemma3", "bart"))],
)
def test_other_decoding_with_and_without_a_cache(name, way):
    model, given = decoder(name), generation_inputs(name)
    runs = []
    for use_cache in (True, False):
        set_seed(1)
        runs.append(generate(model, given, **WAYS[way], use_cache=use_cache))
    assert torch.equal(*runs)
    assert len(runs[0].unique(dim=0)) == 2 * WAYS[way].get("num_return_sequences", 1)


@pytest.mark.parametrize("name", tried(*(x for x in DECODERS if x != "bert_decoder")))
def test_left_padded_batches_equal_rows_alone_and_those_without_a_cache(name):
    model, ids = decoder(name), token_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :11] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask}
    together = generate(model, given)
    assert torch.equal(together, generate(model, given, use_cache=False))
    assert len(together[:, -NEW:].unique()) >= 2
    if name in ("llama", "gpt2"):
        padded = {"input_ids": ids[1:2], "attention_mask": mask[1:2]}
        assert torch.equal(generate(model, padded), together[1:2])
    for row, padding in enumerate((0, 5, 11)):
        alone = generate(model, {"input_ids": ids[row : row + 1, padding:]})
        assert torch.equal(together[row : row + 1, padding:], alone)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_prompt_continued_over_several_calls(name):
    model, ids = decoder(name), token_ids(2, 12)
    mask, cache = padding_mask(2, 12, "left", 5), None
    for call in range(3):
        given = {"input_ids": ids, "attention_mask": mask}
        fresh = generate(model, given)
        sequences, cache = result_of(model, {**given, CACHE_KEYWORD: cache})
        assert torch.equal(sequences, fresh)
        assert cache.get_seq_length() == fresh.shape[1] - 1
        ids = torch.cat((fresh, token_ids(2, 4, seed=call)), 1)
        mask = torch.cat((mask, mask.new_ones(2, NEW + 4)), 1)


def test_a_prompt_read_in_chunks():
    model, given = decoder(), generation_inputs("llama", length=23)
    assert torch.equal(generate(model, given, prefill_chunk_size=5), generate(model, given))


@pytest.mark.parametrize("layers", [(0,), (-1,)])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_hybrids_of_linear_and_exact_layers(name, layers):
    model, ids = decoder(name, layers=layers), token_ids(2, 12)
    given = {"input_ids": ids, "attention_mask": padding_mask(2, 12, "left", 5)}
    sequences, cache = result_of(model, given)
    assert torch.equal(sequences, generate(model, given, use_cache=False))
    assert len(states(cache)) == 1
    assert torch.equal(sequences[1:, 5:], generate(model, {"input_ids": ids[1:, 5:]}))


def test_cross_attention_that_is_linear_too():
    model = linear("bart", num_features=32, window=4, cross_attention=True)
    given = {**generation_inputs("bart"), "attention_mask": padding_mask(2, 12, "right", 4)}
    for options in ({}, {"num_beams": 3}):
        cached = generate(model, given, **options)
        assert torch.equal(cached, generate(model, given, **options, use_cache=False))
    alone = generate(model, {"input_ids": given["input_ids"][1:, :8]})
    assert torch.equal(generate(model, given)[1:], alone)


def test_threads_that_generate_with_one_model_do_not_disturb_each_other():
    model = decoder()
    prompts = [generation_inputs("llama", rows=1 + i, length=6 + 3 * i, seed=i) for i in range(4)]
    alone, results = [generate(model, given) for given in prompts], [[] for _ in prompts]

    def run(place):
        for _ in range(3):
            results[place].append(generate(model, prompts[place]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, expected in zip(results, alone, strict=True):
        assert len(found) == 3
        assert all(torch.equal(got, expected) for got in found)


# ------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper"])
def test_the_cache_is_as_large_after_200_tokens_as_after_20(name, kind):
    model, sizes = decoder(name, kind), []
    for count in (20, 200):
        given = {"input_ids": token_ids(2, count)}
        if name == "whisper":
            given = {**inputs(name), "decoder_input_ids": token_ids(2, count)}
        with torch.no_grad():
            cache = getattr(model(**given, use_cache=True), CACHE_KEYWORD)
        sizes.append([layer.state.nbytes for layer in states(cache)])
    assert len(sizes[0]) == 2
    assert sizes[0] == sizes[1]
    # Float32: the sums and two numbers a feature; keys and values in the window and of the sinks,
    # and the masks of a byte each.
    heads = 2 if name == "llama" else 4
    kept = KINDS[kind].get("window", 0) + KINDS[kind].get("sinks", 0)
    numbers = 16 * (HEAD_DIM + 2) + kept * 2 * HEAD_DIM
    assert sizes[0][0] == 2 * (heads * numbers * 4 + kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
    ],
)
def test_rows_of_the_cache_can_be_repeated_selected_and_reordered(change, rows, kind):
    """With their padding, which later calls need not tell again."""
    model, ids = decoder(kind=kind), token_ids(3, 12)
    following = token_ids(6, 4, seed=1)[: len(rows)]
    mask = padding_mask(3, 12, "left", 5)
    first, cache = step(model, ids, attention_mask=mask)
    # A reset cache is empty.
    cache.reset()
    assert cache.get_seq_length() == 0
    again, cache = step(model, ids, cache, attention_mask=mask)
    assert torch.equal(again, first)
    change(cache)
    got, _ = step(model, following, cache)
    for place, row in enumerate(rows):
        whole = torch.cat((ids[row, 5 if row == 2 else 0 :], following[place]))
        torch.testing.assert_close(got[place], logits(model, whole[None])[0, -4:], **CLOSE)


@pytest.mark.parametrize("told", ["everything", "its own tokens", "nothing"])
@pytest.mark.parametrize(("name", "rows"), [("llama", 1), ("llama", 2), ("qwen2", 2), ("gpt2", 2)])
def test_padding_of_the_first_call_is_known_to_later_ones(name, rows, told):
    model, ids, mask = decoder(name), token_ids(rows, 20), padding_mask(rows, 20, "left")
    positions, cache, parts = (mask.cumsum(-1) - 1).clamp_min(0), None, []
    for start, stop in ((0, 9), (9, 14), (14, 15), (15, 20)):
        masks = {"everything": mask[:, :stop], "its own tokens": mask[:, start:stop]}
        given = {"attention_mask": masks.get(told) if start else mask[:, :stop]}
        if name == "gpt2":
            given["position_ids"] = positions[:, start:stop]
        part, cache = step(model, ids[:, start:stop], cache, **given)
        parts.append(part)
    got = torch.cat(parts, 1)
    torch.testing.assert_close(got[-1:, 7:], logits(model, ids[-1:, 7:]), **CLOSE)


def test_padding_within_a_continued_call_is_skipped():
    model, ids = decoder(), token_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[1, 8:11] = 0
    _, cache = step(model, ids[:, :8], attention_mask=mask[:, :8])
    got, _ = step(model, ids[:, 8:], cache, attention_mask=mask)
    full = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(got[:, 3:], full[:, 11:], **CLOSE)
    assert not torch.allclose(full[1, 11:], logits(model, ids)[1, 11:], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_float32_in_half_precision(dtype):
    model, given = copy.deepcopy(decoder()).to(dtype), generation_inputs("llama")
    options = {"max_new_tokens": 60, "output_logits": True, "return_dict_in_generate": True}
    result = generate(model, given, **options)
    for layer in states(getattr(result, CACHE_KEYWORD)):
        assert layer.state.key_value.dtype == layer.state.key_sum.dtype == torch.float32
        assert layer.state.log_scale.dtype == torch.float32
    assert all(x.isfinite().all() for x in result.logits)


def test_a_step_reads_its_own_token_alone():
    """The attention of a step gets one key, however long the past; nothing is redrawn."""
    model, lengths = copy.deepcopy(decoder()), []
    before = {key: x.clone() for key, x in model.named_buffers()}
    for favor in favors(model):
        favor.register_forward_pre_hook(lambda _, args: lengths.append(args[1].shape[2]))
    generate(model, generation_inputs("llama"))
    assert lengths == [12, 12] + [1, 1] * (NEW - 1)
    assert all(torch.equal(x, before[key]) for key, x in model.named_buffers())


# ------------------------------------------------------------------------------------- refusals


def offloading(model):
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    return cache


def stripped(model):
    """A cache, and a model that has lost the hooks that bring it to its attention."""
    _, cache = step(model, token_ids(2, 8))
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return cache


def fixed(model):
    return StaticCache(config=model.config, max_cache_len=16)


def of_another(model):
    return step(build("llama"), token_ids(2, 6))[1]


def of_rows(rows):
    return lambda model: step(model, token_ids(rows, 8))[1]


LATE = {"position_ids": torch.tensor([[8]] * 2), "use_cache": False}
SHORT = {"attention_mask": torch.ones(2, 3), "input_ids": token_ids(2, 3)}
# Cache made for a model, layers, arguments of the call that continues it, words of the refusal.
CACHES = [
    (fixed, None, {}, "StaticLayer"),
    (offloading, None, {}, "offloading"),
    (of_another, None, {}, "holds 6 keys and values that another model computed"),
    (of_rows(3), None, {}, "state must have"),
    (lambda model: None, None, LATE, "a step that continues earlier tokens"),
    (stripped, None, {}, "continues earlier tokens|start with a"),
    (of_rows(2), (0,), SHORT, "one for each of the 11 tokens so far"),
]


@pytest.mark.parametrize(("make", "layers", "options", "words"), CACHES)
def test_caches_that_are_refused(make, layers, options, words):
    model = copy.deepcopy(decoder(layers=layers))
    given = {"input_ids": token_ids(2, 1), CACHE_KEYWORD: make(model), **options}
    with pytest.raises((ValueError, RuntimeError), match=words):
        model(**given)


def test_a_past_of_linear_attention_is_refused_by_exact_attention():
    model, ids = copy.deepcopy(decoder()), token_ids(2, 6)
    _, cache = step(model, ids)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="no other attention can continue"):
        step(model, ids, cache)


BACK = "not supported with stateful models"
STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("llama", {"assistant_model": build("llama", seed=1)}, BACK),
        ("llama", {"prompt_lookup_num_tokens": 2}, BACK),
        ("llama", STATIC, "leave cache_implementation at its default"),
        ("whisper", STATIC, "leave cache_implementation at its default"),
    ],
)
def test_decoding_that_takes_tokens_back_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        generate(decoder(name), generation_inputs(name, rows=1), **options)
