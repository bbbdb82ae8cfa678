"""The cache: its size, its rows, and taking tokens back."""

import copy

import pytest
import torch

from performers.models import PerformerCache
from tests.models.cases import (
    CACHED,
    MAIN,
    MODELS,
    TOLERANCE,
    causal_model,
    left_padded,
    masked_model,
    read,
    rows_of,
    tokens,
)

SUMS = ("favor-softmax", "favor-relu", "identity", "hybrid, outer", "hybrid, inner")


def batch():
    """Three rows of 13, 6 and 2 tokens, padded on the left."""
    return left_padded(rows_of(13, 6, 2))


def continued(model, cache):
    """The logits of two more tokens in each row (the same in all)."""
    rows = cache.real_tokens.shape[0]
    return model(tokens(1, 2, seed=5).expand(rows, -1), past_key_values=cache).logits


@pytest.mark.parametrize("name", MAIN)
def test_a_call_without_a_mask_continues_a_padded_one(name):
    """The padding of the past stays padding."""
    model = causal_model(name)
    ids, mask = batch()
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    _, cache = read(model, ids[:, :11], mask[:, :11], (11,))
    after, _ = read(model, ids[:, 11:], None, (1, 1), cache=cache)
    torch.testing.assert_close(after, whole[:, 11:], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
def test_bytes(name):
    """Layers of exact attention hold float64 keys and values, of two rows and width 32."""
    model = causal_model(name)
    lengths = (1, 16, 100)
    caches = [model(tokens(2, length), use_cache=True).past_key_values for length in lengths]
    exact = len(MODELS[name].get("exact_layers", [])) or 2 * (name == "exact")
    fixed = caches[0].nbytes - 2 * 8 * 2 * 32 * exact
    assert [cache.nbytes - fixed for cache in caches] == [
        2 * 8 * 2 * 32 * exact * length for length in lengths
    ]
    assert (fixed > 0) == (name not in ("exact", "identity"))
    assert caches[0].keeps_keys == (name == "exact")


@torch.no_grad()
@pytest.mark.parametrize("name", [*MAIN, "hybrid, inner"])
def test_rows_of_the_cache_can_be_reordered_repeated_and_chosen(name):
    model = causal_model(name)
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


@pytest.mark.parametrize("name", MAIN)
def test_an_empty_cache_can_be_reordered(name):
    model, ids = causal_model(name), tokens(2, 5)
    for method in ("reorder_cache", "batch_select_indices"):
        cache = PerformerCache(name, 2)
        getattr(cache, method)(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.parametrize("name", [*MAIN, "hybrid, inner"])
def test_a_reset_cache_is_empty(name):
    model = causal_model(name)
    ids, mask = batch()
    first, cache = read(model, ids, mask, (13,))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    again, _ = read(model, ids, mask, (6, 7), cache=cache)
    torch.testing.assert_close(again[mask.bool()], first[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("name", SUMS)
def test_sums_cannot_be_cropped(name):
    """A refused crop cuts no layer, whichever can be cropped."""
    cache = causal_model(name)(tokens(2, 5), use_cache=True).past_key_values
    assert not getattr(cache, "is_croppable", False)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-2)
    cache.crop(0)
    assert {layer.get_seq_length() for layer in cache.layers} == {5}
    if name == "favor-softmax":
        with pytest.raises(TypeError, match="call set_state"):
            cache.layers[0].update(None, None)


@pytest.mark.parametrize("is_padded", [True, False])
def test_cropped_exact_attention_forgets_tokens(is_padded):
    model = causal_model("exact")
    ids, mask = batch()
    if not is_padded:
        mask = torch.ones_like(mask)
    _, short = read(model, ids[:, :10], mask[:, :10], (10,))
    _, cropped = read(model, ids, mask, (13,))
    cropped.crop(-3)
    assert cropped.get_seq_length() == 10
    torch.testing.assert_close(continued(model, cropped), continued(model, short), **TOLERANCE)


@pytest.mark.parametrize("name", SUMS)
def test_no_attention_matrix_where_the_keys_are_gone(name):
    model, ids = causal_model(name), tokens(2, 8)
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
    real = mask[:, 9:].bool()
    for weights, expected in zip(rest.attentions, whole, strict=True):
        assert weights.shape == (3, 2, 4, 13)
        rows = (x.transpose(1, 2)[real] for x in (weights, expected[:, :, 9:]))
        torch.testing.assert_close(*rows, **TOLERANCE)


def test_no_cache_in_training_nor_without_causality_unless_asked_for():
    model = causal_model().train()
    assert model(tokens(1, 3)).past_key_values is None
    assert model(tokens(1, 3), use_cache=True).past_key_values is not None
    base = masked_model().performer
    assert base(tokens(1, 3)).past_key_values is None
    assert base(tokens(1, 3), use_cache=True).past_key_values is None
