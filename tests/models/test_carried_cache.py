"""A past that is handed on: detached, forgotten by row without a trace, limited, of one draw."""

import pytest
import torch

from performers.features import redraw_features_
from performers.models import PerformerConfig, PerformerForCausalLM
from performers.models.arguments import CACHE_KEYWORD
from performers.models.cache import PerformerCache

KINDS = {
    "softmax": {"attention": "favor-softmax"},
    "window": {"attention": "favor-softmax", "window": 3, "sinks": 2},
    "trigonometric": {"attention": "favor-softmax", "estimator": "trigonometric"},
    "relu": {"attention": "favor-relu"},
    "some exact": {"attention": "favor-softmax", "exact_layers": [1]},
    "exact": {"attention": "exact"},
    "memory": {"attention": "exact", "attention_options": {"memory": 4}},
}


def build(kind, **changes):
    torch.manual_seed(0)
    config = PerformerConfig(
        **{
            "vocab_size": 20,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "hidden_dropout_prob": 0.0,
            "initializer_range": 0.5,
            "num_features": 16,
            "is_decoder": True,
            **KINDS[kind],
            **changes,
        }
    )
    # The normalisers of trigonometric features come close to zero.
    return PerformerForCausalLM(config).double().train()


def tokens(rows=3, length=6, seed=1):
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(seed))


def step(model, ids, cache=None):
    output = model(ids, **{CACHE_KEYWORD: cache}, use_cache=True)
    return output.logits, getattr(output, CACHE_KEYWORD)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forgotten_row_is_as_one_that_begins(kind):
    """To 0.0, whatever the past held, while the other rows go on."""
    model = build(kind)
    first, second, third = (tokens(seed=seed) for seed in (1, 2, 3))
    outputs = []
    for past in (first, tokens(seed=9)):
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


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_forgotten_is_an_empty_cache(kind):
    model = build(kind)
    _, cache = step(model, tokens())
    cache.forget_(torch.ones(3, dtype=torch.bool))
    assert cache.get_seq_length() == 0
    again, _ = step(model, tokens(seed=2), cache)
    new, _ = step(model, tokens(seed=2))
    assert (again - new).abs().max() == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_detached_past_has_no_gradient(kind):
    model = build(kind)
    _, cache = step(model, tokens())
    logits, _ = step(model, tokens(seed=2), cache.detach_())
    logits.sum().backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with torch.no_grad():
        _, cache = step(model, tokens())
    step(model, tokens(seed=2), cache)[0].sum().backward()
    for one, parameter in zip(ours, model.parameters(), strict=True):
        assert torch.allclose(one, parameter.grad, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_past_goes_on_to_the_bit(kind, tmp_path):
    model = build(kind)
    _, cache = step(model, tokens())
    cache.forget_(torch.tensor([True, False, False]))
    torch.save(cache.detach_().state_dict(), tmp_path / "past")
    expected, _ = step(model, tokens(seed=2), cache)
    config = model.config
    other = PerformerCache(
        config.attention, 2, config.exact_layers, config.attention_options.get("memory")
    )
    other.load_state_dict(torch.load(tmp_path / "past", weights_only=True))
    assert torch.equal(step(model, tokens(seed=2), other)[0], expected)


def test_memory_is_exact_attention_to_the_last_keys_before_the_segment():
    """The oracle is a dense mask over all keys: those of the segment, and 4 before it."""
    model = build("memory", num_hidden_layers=1)
    whole = tokens(rows=1, length=18)
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
    model = build("memory").eval()
    made = model.generate(tokens(rows=2), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 18)
    _, cache = step(model, made)
    assert (cache.get_seq_length(), cache.layers[0].keys.shape[-2]) == (18, 4)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(1)
    with pytest.raises(ValueError, match="memory must be None or at least 1"):
        build("memory", attention_options={"memory": 0})


def test_sums_over_features_of_another_draw_are_refused():
    model = build("softmax")
    _, cache = step(model, tokens())
    redraw_features_(model)
    with pytest.raises(ValueError, match="redrawn or loaded since"):
        step(model, tokens(), cache)
    cache.reset()
    step(model, tokens(), cache)
