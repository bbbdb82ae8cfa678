"""Defects of caches in public implementations, each of which is none here."""

import pytest
import torch
from transformers import set_seed

from performers.nn import FavorAttention
from tests.convert.architectures import (
    generation_inputs,
    output,
    padding_mask,
    token_ids,
)
from tests.convert.decoding import NEW, decoder, sequences, states


@pytest.mark.parametrize("count", [1, 5, 12])
def test_defect_the_cache_forgets_the_past(count):
    """A change of the first token must reach a step that has only the cache to know it by."""
    model, ids = decoder(), token_ids(1, 40)
    changed = ids.clone()
    changed[:, 0] = 5 + (changed[:, 0] + 1) % 50

    def last(tokens):
        with torch.no_grad():
            cache = model(tokens[:, :-count]).past_key_values
            for step in tokens[:, -count:].split(1, 1):
                result = model(step, past_key_values=cache)
        return result.logits[:, -1]

    full = [output(model, {"input_ids": x}, use_cache=False)[:, -1] for x in (ids, changed)]
    assert (full[0] - full[1]).abs().max() > 1e-3
    torch.testing.assert_close(last(ids) - last(changed), full[0] - full[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mask_of_the_call", ["everything", "its own tokens", "none"])
@pytest.mark.parametrize("rows", [1, 2])
def test_defect_padding_of_an_earlier_call_leaks_into_a_continued_one(rows, mask_of_the_call):
    model, ids = decoder(), token_ids(rows, 20)
    mask = padding_mask(rows, 20, "left", 6)
    given = {"everything": mask, "its own tokens": mask[:, 12:], "none": None}
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        first = model(ids[:, :12], attention_mask=mask[:, :12], position_ids=positions[:, :12])
        got = model(
            ids[:, 12:],
            past_key_values=first.past_key_values,
            attention_mask=given[mask_of_the_call],
            position_ids=positions[:, 12:],
        )
    alone = output(model, {"input_ids": ids[-1:, 6:]}, use_cache=False)[:, 6:]
    torch.testing.assert_close(got.logits[-1:], alone, atol=1e-4, rtol=1e-4)


def test_defect_padding_within_a_continued_call_is_skipped():
    model, ids = decoder(), token_ids(2, 14)
    mask = torch.ones_like(ids)
    # The second call brings padding in the middle of the row.
    mask[1, 8:11] = 0
    with torch.no_grad():
        cache = model(ids[:, :8], attention_mask=mask[:, :8]).past_key_values
        got = model(ids[:, 8:], past_key_values=cache, attention_mask=mask).logits
    full = output(model, {"input_ids": ids}, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(got[:, 3:], full[:, 11:], atol=1e-4, rtol=1e-4)
    unmasked = output(model, {"input_ids": ids}, use_cache=False)
    assert not torch.allclose(full[1, 11:], unmasked[1, 11:], atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_defect_the_padding_of_a_single_row_is_skipped(name):
    model, ids = decoder(name), token_ids(1, 12)
    mask = padding_mask(1, 12, "left", 5)
    padded = sequences(model, {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(padded[:, 5:], sequences(model, {"input_ids": ids[:, 5:]}))


def test_defect_exact_layers_of_a_hybrid_take_a_short_mask_for_a_long_one():
    model, ids = decoder(layers=[0]), token_ids(2, 12)
    with torch.no_grad():
        cache = model(ids[:, :8]).past_key_values
    with pytest.raises(ValueError, match="one for each of the 12 tokens so far"):
        model(ids[:, 8:], past_key_values=cache, attention_mask=torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_defect_the_state_has_half_precision(dtype):
    model = decoder().to(dtype)
    with torch.no_grad():
        cache = model(token_ids(1, 30)).past_key_values
    for layer in states(cache):
        assert layer.state.key_value.dtype == layer.state.key_sum.dtype == torch.float32
        assert layer.state.log_scale.dtype == torch.float32
    result = sequences(
        model,
        generation_inputs("llama"),
        max_new_tokens=60,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert all(logits.isfinite().all() for logits in result.logits)


def test_defect_features_are_redrawn_at_inference():
    model, given = decoder(), generation_inputs("llama")
    before = {n: x.clone() for n, x in model.named_buffers()}
    first = sequences(model, given)
    set_seed(99)
    assert torch.equal(sequences(model, given), first)
    assert all(torch.equal(x, before[n]) for n, x in model.named_buffers())


def test_defect_a_step_reads_more_than_its_own_token():
    """The attention of a step gets one key, however long the past."""
    model, lengths = decoder(), []
    for module in model.modules():
        if isinstance(module, FavorAttention):
            module.register_forward_pre_hook(lambda _, args: lengths.append(args[1].shape[2]))
    sequences(model, generation_inputs("llama"))
    assert lengths == [12, 12] + [1, 1] * (NEW - 1)


def test_defect_an_absent_past_is_taken_for_a_first_call():
    """A step whose cache does not arrive under a name or type that is known."""
    model, ids = decoder(), token_ids(1, 8)
    with torch.no_grad():
        cache = model(ids).past_key_values
    step = {"input_ids": ids[:, :1], "position_ids": torch.tensor([[8]])}
    with pytest.raises(ValueError, match="a step that continues earlier tokens"):
        model(**step, use_cache=False)
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook.__name__ == "enter_attention":
                del module._forward_pre_hooks[key]
    with pytest.raises((ValueError, RuntimeError), match=r"continues earlier tokens|start with a"):
        model(ids[:, :3], past_key_values=cache)
