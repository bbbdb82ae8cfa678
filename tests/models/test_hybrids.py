"""Models some of whose layers have exact attention: configuration, cache, generation."""

import copy

import pytest
import torch

from performers import FavorState
from performers.models import PerformerCache, PerformerConfig, PerformerForMaskedLM
from performers.models.attention import ExactMechanism, FavorMechanism
from tests.models.cases import causal_model, left_padded, make_config, right_padded, tokens

# The exact layers of three: none, and some that begin and end with either kind.
HYBRIDS = {"none": None, "outer": [0, 2], "middle": [1], "first": [0, 1]}


def hybrid(name, *, seed=3):
    """A causal model of three layers in float64 that does not repeat its input."""
    options = {"num_features": 16, "window": 2, "sinks": 1, "exact_layers": HYBRIDS[name]}
    return causal_model(seed=seed, num_hidden_layers=3, tie_word_embeddings=False, **options)


def kinds(model):
    return [type(layer.attention.mechanism) for layer in model.performer.layers]


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_the_cache_equals_generation_without(name, beams):
    model = hybrid(name)
    ids, mask = left_padded([tokens(1, size, seed=size)[0] for size in (9, 4)])
    options = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    cached = model.generate(ids, **options)
    assert len(cached[:, 9:].unique()) > 2
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("padded", [left_padded, right_padded])
def test_parts_equal_the_whole(name, padded):
    model = hybrid(name)
    ids, mask = padded([tokens(1, size, seed=size)[0] for size in (15, 9)])
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts = None, []
    for part, part_mask in zip(ids.split(4, dim=1), mask.split(4, dim=1), strict=True):
        out = model(part, attention_mask=part_mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], rtol=1e-6, atol=1e-8)
    assert cache.get_seq_length() == 15


@torch.no_grad()
def test_the_cache_has_a_layer_of_the_kind_of_each():
    model = hybrid("middle")
    cache = model(tokens(2, 10), use_cache=True).past_key_values
    assert cache.layers[1].keys.shape == (2, 2, 10, 16)
    assert isinstance(cache.layers[0].state, FavorState)
    assert isinstance(cache.layers[2].state, FavorState)
    before = cache.nbytes
    state = sum(cache.layers[i].state.nbytes for i in (0, 2))
    cache = model(tokens(2, 10), past_key_values=cache).past_key_values
    # Only the exact layer grows: float64 keys and values.
    assert cache.nbytes - before == 2 * 8 * 2 * 10 * 32
    assert state == sum(cache.layers[i].state.nbytes for i in (0, 2))
    plain = model(tokens(2, 2), past_key_values=copy.deepcopy(cache)).logits
    cache.reorder_cache(torch.tensor([1, 0]))
    again = model(tokens(2, 2).flip(0), past_key_values=copy.deepcopy(cache)).logits
    torch.testing.assert_close(again.flip(0), plain, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="output_attentions is not available"):
        model(tokens(2, 2), past_key_values=cache, output_attentions=True)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["outer", "middle", "first"])
def test_a_refused_crop_cuts_no_layer(name):
    cache = hybrid(name)(tokens(2, 10), use_cache=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [10] * 3
    cache.crop(0)


@pytest.mark.parametrize("other", ["none", "outer", "first"])
def test_the_cache_of_another_hybrid_is_refused(other):
    past = hybrid(other)(tokens(1, 3), use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=r"exact_layers=.* but this one has 'favor-softmax', 3 and"
    ):
        hybrid("middle")(tokens(1, 3), past_key_values=past)


def test_matrices_of_hybrids():
    model = hybrid("outer")
    weights = model(tokens(2, 10), output_attentions=True, use_cache=False).attentions
    for matrix in weights:
        total = matrix.sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_configurations_with_exact_layers(tmp_path):
    config = make_config(num_hidden_layers=4, exact_layers=(2, 0, 2))
    assert config.exact_layers == [0, 2]
    attentions = [config.layer_attention(i) for i in range(4)]
    assert attentions == ["exact", "favor-softmax", "exact", "favor-softmax"]
    config.save_pretrained(tmp_path)
    loaded = PerformerConfig.from_pretrained(tmp_path)
    assert loaded.exact_layers == [0, 2]
    assert kinds(PerformerForMaskedLM(loaded)) == [ExactMechanism, FavorMechanism] * 2
    for none in (None, [], ()):
        assert make_config(exact_layers=none).exact_layers is None
    # The library's other kernels can have them too.
    assert make_config("favor-relu", exact_layers=[1]).layer_attention(1) == "exact"
    for layers in ([2], [-1], [0.0], ["0"], [True]):
        with pytest.raises(ValueError, match=r"exact_layers must be indices .* 0..1, got"):
            make_config(exact_layers=layers)
    for attention in ("exact", "identity"):
        with pytest.raises(ValueError, match=f"exact_layers needs a favor .*'{attention}'"):
            make_config(attention, exact_layers=[0])


def test_the_cache_of_a_model_without_hybrids_is_as_before():
    assert PerformerCache("favor-softmax", 2).keeps_keys is False
    assert PerformerCache("exact", 2).keeps_keys is True
    assert PerformerCache("favor-softmax", 2, [0]).keeps_keys is False
