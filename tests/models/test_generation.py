"""``generate()``: with the cache as without it, alone as in a batch, at a constant cost."""

import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed

from performers.models import PerformerForCausalLM
from performers.models.configuration import POSITIONS
from tests.models.cases import (
    CACHED,
    EXACT_TERMS,
    MAIN,
    build,
    causal_model,
    left_padded,
    rows_of,
    tokens,
)

NEW = 8


def generator_model(name="favor-softmax", **options):
    """A model that does not repeat its input, as one with tied embeddings does before training."""
    return causal_model(name, tie_word_embeddings=False, seed=3, **options)


def generate(model, ids, mask=None, **options):
    """``NEW`` more tokens, greedily unless told otherwise, past any end token."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{**settings, **options})


def recomputed(model, ids, mask=None):
    """Greedy decoding by hand: the whole row again for each token, and no end token."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
    return ids


@pytest.mark.parametrize(
    ("name", "positions"),
    [*((MAIN[0], x) for x in POSITIONS), *((name, POSITIONS[0]) for name in MAIN[1:])],
)
def test_batched_prompts_equal_prompts_alone(name, positions):
    model = generator_model(name, position_embedding=positions)
    rows = rows_of(11, 5, 1)
    ids, mask = left_padded(rows)
    together = generate(model, ids, mask)
    assert torch.equal(together, recomputed(model, ids, mask))
    for row, prompt in zip(together, rows, strict=True):
        assert torch.equal(row[-NEW - len(prompt) :], generate(model, prompt[None])[0])


@pytest.mark.parametrize("name", [*MAIN, *EXACT_TERMS])
def test_beams_with_and_without_a_cache(name):
    model = generator_model(name)
    ids, mask = left_padded(rows_of(8, 5))
    options = {"num_beams": 4, "num_return_sequences": 2}
    found = generate(model, ids, mask, **options)
    assert found.shape == (4, 8 + NEW)
    assert torch.equal(found, generate(model, ids, mask, use_cache=False, **options))
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize("name", [*MAIN, *EXACT_TERMS])
def test_generation_is_continued_over_several_calls(name):
    model = generator_model(name)
    ids, mask = left_padded(rows_of(8, 5))
    expected = generate(model, ids, mask)
    cache, row, seen = None, ids, mask
    for count in (5, 1, NEW - 6):
        output = generate(
            model,
            row,
            seen,
            max_new_tokens=count,
            min_new_tokens=count,
            past_key_values=cache,
            return_dict_in_generate=True,
        )
        row, cache = output.sequences, output.past_key_values
        seen = torch.cat((mask, mask.new_ones(2, row.shape[1] - 8)), dim=1)
        assert cache.get_seq_length() == row.shape[1] - 1
    assert (row == expected).all()


@pytest.mark.parametrize("name", MAIN)
def test_generation_from_embeddings(name):
    model = generator_model(name)
    ids = tokens(2, 6)
    embedded = model.get_input_embeddings()(ids)
    found = model.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
    )
    assert (found == recomputed(model, ids)[:, 6:]).all()


@pytest.mark.parametrize(
    "name", ["favor-softmax", pytest.param("favor-relu", marks=pytest.mark.exhaustive)]
)
def test_generation_in_bfloat16_stays_finite(name):
    model = build(PerformerForCausalLM, name, tie_word_embeddings=False).to(torch.bfloat16)
    set_seed(0)
    output = generate(
        model,
        tokens(2, 5),
        do_sample=True,
        max_new_tokens=120,
        min_new_tokens=120,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(output.logits, dim=1)
    assert logits.shape[:2] == (2, 120)
    assert torch.isfinite(logits).all()
    # The state has not drifted: the last steps still agree with one call over the whole row.
    whole = model(output.sequences[:, :-1], use_cache=False).logits[:, -120:]
    error = (whole.float() - logits.float())[:, -20:].norm() / whole[:, -20:].float().norm()
    assert error < 0.05


@pytest.mark.parametrize("name", MAIN)
def test_assisted_decoding_is_refused(name):
    model = generator_model(name)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        generate(model, tokens(1, 6), assistant_model=generator_model(name))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        generate(model, tokens(1, 6), prompt_lookup_num_tokens=3)


def test_no_deprecation_of_transformers_reaches_a_user(caplog):
    """Log entries, whichever name the cache has; warnings are errors in all tests."""
    model, ids = causal_model(), tokens(1, 6)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        out = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=out.past_key_values)
        cache = model(ids[:, :4], use_cache=True).cache
        model.generate(ids, max_new_tokens=2, past_key_values=cache, eos_token_id=None)
    finally:
        logger.removeHandler(caplog.handler)
    assert "deprecated" not in caplog.text


def step_flops(length, name, **options):
    model = build(PerformerForCausalLM, name, max_position_embeddings=4096)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = model(tokens(1, length), use_cache=True, logits_to_keep=1).past_key_values
        before = counter.get_total_flops()
        model(tokens(1, 1), past_key_values=cache, **options)
    return counter.get_total_flops() - before, cache.nbytes


@pytest.mark.parametrize("name", [x for x in CACHED if x != "exact" and "hybrid" not in str(x)])
def test_work_and_memory_of_a_step_do_not_grow(name):
    short, long = (step_flops(length, name) for length in (256, 2048))
    assert short == long
    assert short[0] > 0


def test_each_generated_token_is_one_row_of_work():
    """``generate`` feeds the model the new token only, not the whole row again."""
    model = build(PerformerForCausalLM)
    lengths = []
    model.performer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(tokens(1, 40), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert lengths == [40, 1, 1, 1, 1, 1]
