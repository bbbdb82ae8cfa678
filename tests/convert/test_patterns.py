"""Masks of transformers, taken apart."""

import pytest
import torch
from transformers import BertConfig, DynamicCache, LlamaConfig, MistralConfig, masking_utils

from performers.convert.interface import implementation as interface
from performers.convert.interface.masks import AttentionPattern, pattern_mask

MAKERS = {
    "causal": (masking_utils.create_causal_mask, LlamaConfig()),
    "sliding": (masking_utils.create_sliding_window_causal_mask, MistralConfig(sliding_window=3)),
    "chunked": (masking_utils.create_chunked_causal_mask, LlamaConfig(attention_chunk_size=3)),
    "bidirectional": (masking_utils.create_bidirectional_mask, BertConfig()),
    "bidirectional sliding": (
        masking_utils.create_bidirectional_sliding_window_mask,
        BertConfig(sliding_window=2),
    ),
}
LENGTH = 9


def make(kind, implementation, mask=None, **options):
    maker, config = MAKERS[kind]
    config._attn_implementation = implementation
    if "bidirectional" in kind:
        options.pop("position_ids", None)
    options.setdefault("past_key_values", None)
    embedded = torch.zeros(2, LENGTH, 4)
    return maker(config=config, inputs_embeds=embedded, attention_mask=mask, **options)


def described(pattern, length=LENGTH):
    """The dense mask of what a pattern says, (B, 1, L, L)."""
    assert pattern.unknown is None
    i, j = torch.arange(length).unsqueeze(-1), torch.arange(length)
    seen = torch.ones(1, length, length, dtype=torch.bool)
    if pattern.is_causal:
        seen = seen & (j <= i)
    if pattern.window is not None:
        seen = seen & ((i - j).abs() <= pattern.window)
    if pattern.key_mask is not None:
        seen = seen & pattern.key_mask.unsqueeze(1)
    if pattern.sequence_ids is not None:
        ids = pattern.sequence_ids
        seen = seen & (ids.unsqueeze(-1) == ids.unsqueeze(1))
    return seen.unsqueeze(1).expand(2, 1, length, length)


PADDING = {
    "none": None,
    "nothing": torch.ones(2, LENGTH, dtype=torch.int64),
    "left": torch.tensor([[1] * LENGTH, [0] * 4 + [1] * 5]),
    "right": torch.tensor([[1] * 6 + [0] * 3, [1] * LENGTH]),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", [x for x in MAKERS if x != "chunked"])
def test_patterns_say_what_dense_masks_say(kind, padding, packed):
    mask, positions = PADDING[padding], None
    if packed:
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 0, 1, 2, 3, 4]])
    pattern = make(kind, interface.IMPLEMENTATION, mask, position_ids=positions)
    eager = make(kind, "eager", mask, position_ids=positions)
    dense = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool) if eager is None else eager == 0
    assert torch.equal(described(pattern), dense.expand(2, 1, LENGTH, LENGTH))
    # The mask that exact layers get.
    exact = pattern.dense()
    if exact is None:
        exact = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        exact = exact.tril() if pattern.is_causal else exact
    assert torch.equal(exact.expand(2, 1, LENGTH, LENGTH), described(pattern))
    assert pattern.shape == (2, 1, LENGTH, LENGTH)
    assert pattern.ndim == 4


def test_a_mask_of_ones_is_no_mask():
    assert make("causal", interface.IMPLEMENTATION, PADDING["nothing"]).key_mask is None


def beside(batch, head, query, key):
    return (query - key).abs() == 1


@pytest.mark.parametrize("option", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("kind", ["causal", "sliding", "bidirectional"])
def test_functions_of_the_models_own_are_not_guessed(kind, option):
    pattern = make(kind, interface.IMPLEMENTATION, **{option: beside})
    assert "a mask of its own" in pattern.unknown
    assert torch.equal(pattern.dense(), make(kind, "sdpa", **{option: beside}))


def test_blocks_that_see_their_future_are_not_guessed():
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, -1, -1, -1]]).expand(2, -1)
    pattern = make("causal", interface.IMPLEMENTATION, block_sequence_ids=blocks)
    assert pattern.unknown is not None
    assert torch.equal(pattern.dense(), make("causal", "sdpa", block_sequence_ids=blocks))


def test_chunks_are_not_guessed():
    pattern = make("chunked", interface.IMPLEMENTATION)
    assert "chunked_overlay" in pattern.unknown
    assert torch.equal(pattern.dense(), make("chunked", "sdpa"))


def test_a_function_that_only_has_a_familiar_name_is_not_trusted():
    def and_masks(*mask_functions):
        def and_mask(batch, head, query, key):
            return mask_functions[0](batch, head, query, key)

        return and_mask

    assert pattern_mask(1, 4, 4, mask_function=and_masks(beside)).unknown is not None


def test_a_callable_object_is_not_guessed():
    class Mask:
        def __call__(self, batch, head, query, key):
            return key <= query

    assert "Mask" in pattern_mask(1, 4, 4, mask_function=Mask()).unknown


def test_a_pattern_that_is_passed_on_stays_as_it_is():
    pattern = make("causal", interface.IMPLEMENTATION, PADDING["left"])
    assert make("sliding", interface.IMPLEMENTATION, pattern) is pattern
    assert pattern.contiguous() is pattern


def test_the_dense_mask_is_made_once():
    calls = []

    def build():
        calls.append(1)
        return torch.ones(1, 1, 2, 2, dtype=torch.bool)

    pattern = AttentionPattern(make_dense=build)
    assert pattern.dense() is pattern.dense()
    assert len(calls) == 1


def test_masks_follow_the_queries_to_their_device():
    pattern = make("causal", interface.IMPLEMENTATION, PADDING["left"])
    moved = pattern.on(torch.device("meta"))
    assert moved.key_mask.device.type == "meta"
    assert pattern.on(torch.device("cpu")).key_mask is pattern.key_mask
    assert pattern.key_mask.device.type == "cpu"


def filled_cache(length):
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, length, 4), torch.zeros(2, 1, length, 4), 0)
    return cache


def test_a_call_that_continues_covers_the_past():
    mask = torch.ones(2, LENGTH + 4, dtype=torch.int64)
    mask[1, :2] = 0
    cache = filled_cache(4)
    pattern = make("causal", interface.IMPLEMENTATION, mask, past_key_values=cache)
    assert torch.equal(pattern.key_mask, mask.bool())
    dense = make("causal", "sdpa", mask, past_key_values=cache)
    assert torch.equal(pattern.dense(), dense)


def test_a_mask_of_the_calls_own_tokens_is_known_but_not_enough_for_exact_layers():
    mask = PADDING["right"]
    pattern = make("causal", interface.IMPLEMENTATION, mask, past_key_values=filled_cache(4))
    assert torch.equal(pattern.key_mask, mask.bool())
    with pytest.raises(ValueError, match="one for each of the 13 tokens so far"):
        pattern.dense()


def test_a_mask_of_another_length():
    mask = torch.ones(2, 5)
    with pytest.raises(ValueError, match="must cover the 13 tokens so far, or the 9"):
        make("causal", interface.IMPLEMENTATION, mask, past_key_values=filled_cache(4))
