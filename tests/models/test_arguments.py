"""Arguments of forward calls: the cache under both its names, packing, and nothing swallowed."""

import inspect
import logging
import warnings

import pytest
import torch
import transformers

from performers.models import (
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
)
from performers.models.arguments import CACHE_KEYWORD, CACHE_KEYWORDS, cache_keyword
from tests.models.cases import TOLERANCE, causal_model, make_config, masked_model, tokens


def packed_batch(*lengths: int):
    rows = [{"input_ids": tokens(1, n)[0].tolist()} for n in lengths]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate(rows)
    batch.pop("labels")
    return batch, rows


def test_the_name_of_the_cache_is_that_of_the_installed_transformers():
    parameters = inspect.signature(
        transformers.GenerationMixin.prepare_inputs_for_generation
    ).parameters
    assert CACHE_KEYWORD in parameters
    with pytest.raises(ValueError, match="takes its cache under none of the names"):
        cache_keyword(lambda input_ids, memory: None)


@pytest.mark.parametrize("name", CACHE_KEYWORDS)
def test_the_cache_has_either_name(name):
    model, ids = causal_model(), tokens(1, 9)
    first = model(ids[:, :5], use_cache=True)
    assert first.cache is first.past_key_values is not None
    rest = model(ids[:, 5:], **{name: first.cache})
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 5:], **TOLERANCE)
    base = model.performer(ids, use_cache=True)
    assert base.cache is base.past_key_values is not None


@pytest.mark.parametrize("name", CACHE_KEYWORDS)
def test_generation_goes_on_from_a_cache_of_either_name(name):
    model, ids = causal_model(), tokens(1, 9)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cache = model(ids[:, :6], use_cache=True).cache
    got = model.generate(ids, **options, **{name: cache})
    assert torch.equal(got, model.generate(ids, use_cache=False, **options))


def test_both_names_at_once_are_refused():
    model, ids = causal_model(), tokens(1, 4)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="cache and past_key_values name the same argument"):
        model(ids, cache=cache, past_key_values=cache)


def test_no_deprecation_of_transformers_reaches_a_user(caplog):
    """Python warnings and log entries alike, whichever name is used."""
    model, ids = causal_model(), tokens(1, 6)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = model(ids, use_cache=True)
            model(ids[:, :1], past_key_values=out.past_key_values)
            cache = model(ids[:, :4], use_cache=True).cache
            model.generate(ids, max_new_tokens=2, past_key_values=cache, eos_token_id=None)
    finally:
        logger.removeHandler(caplog.handler)
    assert "deprecated" not in caplog.text


@pytest.mark.parametrize("name", ["encoder_hidden_states", "token_type_ids", "state"])
@pytest.mark.parametrize("make", [causal_model, masked_model])
def test_unknown_arguments_are_refused(make, name):
    with pytest.raises(TypeError, match=f"does not know the argument.*{name}"):
        make()(tokens(1, 4), **{name: torch.zeros(1, 4)})
    make()(tokens(1, 4), **{name: None})


def test_a_single_token_beyond_the_start_needs_its_past():
    model = causal_model()
    with pytest.raises(ValueError, match=f"no cache of the tokens before it: pass {CACHE_KEYWORD}"):
        model(tokens(1, 1), position_ids=torch.tensor([[7]]))
    model(tokens(1, 1), position_ids=torch.tensor([[0]]))


def test_a_cache_position_that_the_cache_does_not_have_is_refused():
    model, ids = causal_model(), tokens(1, 6)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="cache_position begins at 9, but the cache holds 6"):
        model(ids, cache=cache, cache_position=torch.arange(9, 15))


@pytest.mark.parametrize("values", [(0.0, -1e4), (1, 2)])
def test_masks_of_another_kind_are_refused(values):
    mask = torch.tensor([[values[0], values[0], values[1], values[1]]])
    with pytest.raises(ValueError, match="attention_mask must be bool or hold 0"):
        masked_model()(tokens(1, 4), attention_mask=mask)


@pytest.mark.parametrize("make", [causal_model, masked_model])
@pytest.mark.parametrize(
    "said", [("position_ids",), ("cu_seq_lens_q", "cu_seq_lens_k"), ("position_ids", "seq_idx")]
)
def test_padding_free_batches_keep_sequences_apart(make, said):
    model = make()
    batch, rows = packed_batch(7, 1, 5)
    batch["seq_idx"] = torch.tensor([[0] * 7 + [1] + [2] * 5])
    got = model(batch["input_ids"], **{name: batch[name] for name in said}).logits
    want = [model(torch.tensor([row["input_ids"]])).logits for row in rows]
    torch.testing.assert_close(got, torch.cat(want, 1), **TOLERANCE)


def test_the_whole_batch_of_the_collator_is_understood():
    model = causal_model()
    batch, rows = packed_batch(6, 4)
    want = [model(torch.tensor([row["input_ids"]])).logits for row in rows]
    torch.testing.assert_close(model(**batch).logits, torch.cat(want, 1), **TOLERANCE)


def test_contradicting_boundaries_are_refused():
    batch, _ = packed_batch(6, 4)
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="tell different boundaries"):
        causal_model()(**batch)


def test_positions_that_fall_to_another_place_than_zero_are_refused():
    positions = torch.tensor([[0, 1, 2, 1, 2, 3]])
    with pytest.raises(ValueError, match="do not tell where packed sequences begin"):
        masked_model()(tokens(1, 6), position_ids=positions)
    masked_model()(tokens(1, 6), position_ids=positions, attention_mask=torch.ones(1, 6))


def test_positions_with_gaps_are_those_of_one_sequence():
    model, ids = masked_model(), tokens(1, 6)
    positions = torch.tensor([[0, 1, 2, 7, 8, 20]])
    mask = torch.ones(1, 6)
    got = model(ids, position_ids=positions).logits
    want = model(ids, position_ids=positions, attention_mask=mask).logits
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize(
    "head", [PerformerForSequenceClassification, PerformerForQuestionAnswering]
)
def test_one_answer_a_row_goes_with_one_sequence_a_row(head):
    batch, _ = packed_batch(5, 4)
    with pytest.raises(ValueError, match="answers once for each row"):
        head(make_config()).eval()(**batch)
