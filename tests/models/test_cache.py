"""The cache: its size, its rows, taking tokens back, and a past that is handed on."""

import copy

import pytest
import torch

from performers.features import redraw_features_
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

EVERY_ROW = torch.ones(3, dtype=torch.bool)
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


@pytest.mark.parametrize("forget", [PerformerCache.reset, lambda cache: cache.forget_(EVERY_ROW)])
@pytest.mark.parametrize("name", [*MAIN, "hybrid, inner"])
def test_a_reset_cache_is_empty(name, forget):
    """So is one that has forgotten all rows."""
    model = causal_model(name)
    ids, mask = batch()
    first, cache = read(model, ids, mask, (13,))
    forget(cache)
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


CARRIED = (
    *("favor-softmax", "window and sinks", "trigonometric", "favor-relu", "hybrid", "exact"),
    "memory",
)


def carrying(kind, **changes):
    return causal_model(kind, initializer_range=0.5, num_features=16, **changes).train()


def step(model, ids, cache=None):
    return read(model, ids, None, (ids.shape[1],), cache=cache)


@pytest.mark.parametrize("kind", CARRIED)
def test_a_forgotten_row_is_as_one_that_begins(kind):
    """To 0.0, whatever the past held, while the other rows go on."""
    model = carrying(kind)
    first, second, third = (tokens(3, 6, seed=seed) for seed in (1, 2, 3))
    outputs = []
    for past in (first, tokens(3, 6, seed=9)):
        # Rows 0 and 2 have the same past in both; that of row 1 is forgotten.
        past[[0, 2]] = first[[0, 2]]
        _, cache = step(model, past)
        cache.forget_(torch.tensor([False, True, False]))
        logits, cache = step(model, second, cache)
        later, _ = step(model, third, cache)
        outputs.append((logits, later))
    for one, other in zip(*outputs, strict=True):
        assert (one - other).abs().max() == 0.0
    alone, cache = step(model, second[1:2])
    assert torch.allclose(outputs[0][0][1:2], alone, atol=1e-5)
    alone, _ = step(model, third[1:2], cache)
    assert torch.allclose(outputs[0][1][1:2], alone, atol=1e-5)
    _, cache = step(model, first[[0, 2]])
    goes_on, _ = step(model, second[[0, 2]], cache)
    assert torch.allclose(outputs[0][0][[0, 2]], goes_on, atol=1e-5)


@pytest.mark.parametrize("kind", CARRIED)
def test_a_detached_past_has_no_gradient(kind):
    model = carrying(kind)
    _, cache = step(model, tokens(3, 6))
    logits, _ = step(model, tokens(3, 6, seed=2), cache.detach_())
    logits.sum().backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with torch.no_grad():
        _, cache = step(model, tokens(3, 6))
    step(model, tokens(3, 6, seed=2), cache)[0].sum().backward()
    for one, parameter in zip(ours, model.parameters(), strict=True):
        assert torch.allclose(one, parameter.grad, atol=1e-5)


@pytest.mark.parametrize("kind", CARRIED)
def test_a_saved_past_goes_on_to_the_bit(kind, tmp_path):
    model = carrying(kind)
    _, cache = step(model, tokens(3, 6))
    cache.forget_(torch.tensor([True, False, False]))
    torch.save(cache.detach_().state_dict(), tmp_path / "past")
    expected, _ = step(model, tokens(3, 6, seed=2), cache)
    config = model.config
    other = PerformerCache(
        config.attention, 2, config.exact_layers, config.attention_options.get("memory")
    )
    other.load_state_dict(torch.load(tmp_path / "past", weights_only=True))
    assert torch.equal(step(model, tokens(3, 6, seed=2), other)[0], expected)


def test_memory_is_exact_attention_to_the_last_keys_before_the_segment():
    """The oracle is a dense mask over all keys: those of the segment, and 4 before it."""
    model = carrying("memory", num_hidden_layers=1)
    whole = tokens(1, 18)
    cache, outputs = None, []
    for segment in whole.split(6, dim=1):
        logits, cache = step(model, segment, cache)
        outputs.append(logits)
        assert cache.layers[0].keys.shape[-2] == 4
    hidden = {}

    def keep(module, inputs, output):
        query, key, value = inputs[:3]
        scores = query @ key.mT / query.shape[-1] ** 0.5
        place = torch.arange(18)
        first = place // 6 * 6 - 4
        allowed = (place[None] <= place[:, None]) & (place[None] >= first[:, None])
        hidden["out"] = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
        return hidden["out"], None

    mechanism = model.performer.layers[0].attention.mechanism
    handle = mechanism.register_forward_hook(keep)
    expected = model(whole, use_cache=False).logits
    handle.remove()
    assert torch.allclose(torch.cat(outputs, dim=1), expected, atol=1e-5)
    assert not torch.allclose(model(whole, use_cache=False).logits, expected, atol=1e-3)


def test_memory_generates_and_does_not_grow():
    model = carrying("memory").eval()
    made = model.generate(tokens(2, 6), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 18)
    _, cache = step(model, made)
    assert (cache.get_seq_length(), cache.layers[0].keys.shape[-2]) == (18, 4)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(1)
    with pytest.raises(ValueError, match="memory must be None or at least 1"):
        carrying("memory", attention_options={"memory": 0})


def test_sums_over_features_of_another_draw_are_refused():
    model = carrying("favor-softmax")
    _, cache = step(model, tokens(3, 6))
    redraw_features_(model)
    with pytest.raises(ValueError, match="redrawn or loaded since"):
        step(model, tokens(3, 6), cache)
    cache.reset()
    step(model, tokens(3, 6), cache)
