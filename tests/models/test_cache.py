"""The cache: one call, chunks and single tokens agree, whatever is padded; and its upkeep."""

import copy

import pytest
import torch
from transformers import DynamicCache

from performers.models import PerformerCache, PerformerModel
from tests.models.cases import (
    CACHED,
    FAVOR,
    MAIN,
    PAD,
    POSITION_NAMES,
    TOLERANCE,
    causal_model,
    gradients,
    left_padded,
    make_config,
    masked_model,
    tokens,
)

# Whole, halves, uneven, single tokens; sums to the length of ``batch``.
CUTS = ((13,), (7, 6), (3, 1, 9), (1,) * 13)
MASKS = ("own", "whole")


def batch():
    """Three rows of 13, 6 and 2 tokens, padded on the left."""
    return left_padded([tokens(1, size, seed=size)[0] for size in (13, 6, 2)])


def read(model, ids, mask, cuts, shape="own", cache=None):
    """The logits of a row read in pieces, and the cache after them."""
    logits, start = [], 0
    for size in cuts:
        stop = start + size
        part = None if mask is None else mask[:, (start if shape == "own" else 0) : stop]
        output = model(
            ids[:, start:stop], attention_mask=part, past_key_values=cache, use_cache=True
        )
        logits.append(output.logits)
        cache, start = output.past_key_values, stop
    assert start == ids.shape[1]
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("attention", CACHED)
def test_pieces_equal_the_whole(attention, cuts, shape):
    model = causal_model(attention)
    ids, mask = batch()
    whole = model(ids, attention_mask=mask, use_cache=False)
    assert whole.past_key_values is None
    logits, cache = read(model, ids, mask, cuts, shape)
    real = mask.bool()
    torch.testing.assert_close(logits[real], whole.logits[real], **TOLERANCE)
    assert isinstance(cache, PerformerCache)
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("positions", POSITION_NAMES)
def test_positions_continue(positions, cuts):
    model = causal_model("favor-relu", position_embedding=positions)
    ids, mask = batch()
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    logits, _ = read(model, ids, mask, cuts)
    torch.testing.assert_close(logits[mask.bool()], whole[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("attention", MAIN)
def test_pieces_without_a_mask(attention, cuts):
    model = causal_model(attention)
    ids = tokens(2, 13)
    logits, _ = read(model, ids, None, cuts)
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, **TOLERANCE)


@pytest.mark.parametrize("attention", MAIN)
def test_a_call_without_a_mask_continues_a_padded_one(attention):
    """The padding of the past stays padding."""
    model = causal_model(attention)
    ids, mask = batch()
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    _, cache = read(model, ids[:, :11], mask[:, :11], (11,))
    after, _ = read(model, ids[:, 11:], None, (1, 1), cache=cache)
    torch.testing.assert_close(after, whole[:, 11:], **TOLERANCE)


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("attention", CACHED)
def test_padding_in_the_middle_is_forgotten(attention, shape):
    """Prompts padded on the right, and then continued."""
    model = causal_model(attention)
    first, second = tokens(1, 9, seed=1)[0], tokens(1, 7, seed=2)[0]
    ids = torch.stack((first, torch.cat((second[:4], torch.full((2,), PAD), second[4:]))))
    mask = torch.ones_like(ids)
    mask[1, 4:6] = 0
    logits, _ = read(model, ids, mask, (6, 2, 1), shape)
    for row, alone in enumerate((first, second)):
        expected = model(alone[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], expected, **TOLERANCE)


@pytest.mark.parametrize("attention", MAIN)
def test_gradients_of_pieces_equal_those_of_the_whole(attention):
    model = causal_model(attention).train()
    ids = tokens(2, 13)
    model(ids).logits.square().sum().backward()
    whole = gradients(model)
    logits, _ = read(model, ids, None, (5, 1, 7))
    logits.square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("attention", CACHED)
def test_bytes_held(attention):
    model = causal_model(attention)
    sizes = []
    for length in (1, 16, 300):
        model.performer.positions = None
        cache = model(tokens(2, length), use_cache=True).past_key_values
        sizes.append(cache.nbytes)
    if attention in FAVOR:
        assert sizes[0] == sizes[1] == sizes[2] > 0
    elif attention == "exact":
        # Two layers of float64 keys and values, two rows, width 32.
        assert sizes == [2 * 2 * 8 * 2 * 32 * length for length in (1, 16, 300)]
    else:
        assert sizes == [0, 0, 0]


def continued(model, cache):
    """The logits of two more tokens in each row (the same in all)."""
    rows = cache.real_tokens.shape[0]
    return model(tokens(1, 2, seed=5).expand(rows, -1), past_key_values=cache).logits


@torch.no_grad()
@pytest.mark.parametrize("attention", MAIN)
def test_rows_of_the_cache_can_be_reordered_repeated_and_chosen(attention):
    model = causal_model(attention)
    ids, mask = batch()
    _, cache = read(model, ids, mask, (13,))
    plain = continued(model, copy.deepcopy(cache))
    for method, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_select_indices", torch.tensor([2, 1]), [2, 1]),
    ):
        changed = copy.deepcopy(cache)
        getattr(changed, method)(argument)
        torch.testing.assert_close(continued(model, changed), plain[rows], **TOLERANCE)
    torch.testing.assert_close(continued(model, cache), plain, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("attention", MAIN)
def test_an_empty_cache_can_be_reordered(attention, method):
    model = causal_model(attention)
    cache = PerformerCache(attention, 2)
    getattr(cache, method)(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    ids = tokens(2, 5)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.parametrize("attention", MAIN)
def test_a_reset_cache_is_empty(attention):
    model = causal_model(attention)
    ids, mask = batch()
    first, cache = read(model, ids, mask, (13,))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    again, _ = read(model, ids, mask, (6, 7), cache=cache)
    torch.testing.assert_close(again[mask.bool()], first[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu", "identity"])
def test_sums_cannot_be_cropped(attention):
    model = causal_model(attention)
    cache = model(tokens(2, 5), use_cache=True).past_key_values
    assert not getattr(cache, "is_croppable", False)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-2)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("padded", [True, False])
def test_cropped_exact_attention_forgets_tokens(padded):
    model = causal_model("exact")
    ids, mask = batch()
    if not padded:
        mask = torch.ones_like(mask)
    _, short = read(model, ids[:, :10], mask[:, :10], (10,))
    _, cropped = read(model, ids, mask, (13,))
    cropped.crop(-3)
    assert cropped.get_seq_length() == 10
    torch.testing.assert_close(continued(model, cropped), continued(model, short), **TOLERANCE)


@pytest.mark.parametrize("past", [DynamicCache(), ((torch.zeros(1), torch.zeros(1)),)], ids=repr)
def test_another_kind_of_cache_is_refused(past):
    with pytest.raises(ValueError, match="past_key_values must be the PerformerCache"):
        causal_model()(tokens(1, 3), past_key_values=past)


@pytest.mark.parametrize(
    "options",
    [{"attention": "favor-relu"}, {"attention": "exact"}, {"num_hidden_layers": 3}],
    ids=str,
)
def test_the_cache_of_another_model_is_refused(options):
    past = causal_model(**options)(tokens(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values is the cache of a model with"):
        causal_model()(tokens(1, 3), past_key_values=past)


def test_the_cache_of_another_batch_is_refused():
    model = causal_model()
    past = model(tokens(2, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values holds 2 row\(s\) but the input has 3"):
        model(tokens(3, 3), past_key_values=past)
    past = model(tokens(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values holds 1 row\(s\) but the input has 3"):
        model(tokens(3, 3), past_key_values=past)


def test_bidirectional_models_have_no_cache():
    torch.manual_seed(0)
    model = PerformerModel(make_config()).eval()
    past = causal_model()(tokens(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values needs a causal model"):
        model(tokens(1, 3), past_key_values=past)
    assert model(tokens(1, 3), use_cache=True).past_key_values is None


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu", "identity"])
def test_no_attention_matrix_where_the_keys_are_gone(attention):
    model = causal_model(attention)
    ids = tokens(2, 8)
    first = model(ids[:, :5], use_cache=True, output_attentions=True)
    assert first.attentions[0].shape == (2, 2, 5, 5)
    cache = first.past_key_values
    with pytest.raises(ValueError, match=r"output_attentions is not available .* use_cache=False"):
        model(ids[:, 5:], past_key_values=cache, output_attentions=True)
    # The refused call left nothing in the cache.
    after = model(ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(after, model(ids).logits[:, 5:], **TOLERANCE)


def test_exact_attention_shows_its_matrix_over_the_past():
    model = causal_model("exact")
    ids, mask = batch()
    whole = model(ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    _, cache = read(model, ids[:, :9], mask[:, :9], (9,))
    rest = model(ids[:, 9:], attention_mask=mask, past_key_values=cache, output_attentions=True)
    for weights, expected in zip(rest.attentions, whole, strict=True):
        assert weights.shape == (3, 2, 4, 13)
        real = mask[:, 9:].bool()
        torch.testing.assert_close(
            weights.transpose(1, 2)[real], expected[:, :, 9:].transpose(1, 2)[real], **TOLERANCE
        )


def test_a_continued_call_names_both_shapes_of_mask():
    model = causal_model()
    past = model(tokens(2, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"shape \(2, 3\) or \(2, 8\), got \(2, 5\)"):
        model(tokens(2, 3), past_key_values=past, attention_mask=torch.ones(2, 5))


def test_no_cache_in_training_unless_asked_for():
    model = causal_model().train()
    assert model(tokens(1, 3)).past_key_values is None
    assert model(tokens(1, 3), use_cache=True).past_key_values is not None
    assert masked_model().performer(tokens(1, 3)).past_key_values is None
