"""Arguments of forward calls: the cache under both its names, packing, and what is refused."""

import inspect
from functools import partial

import pytest
import torch
import transformers
from transformers import DynamicCache

from performers.models import (
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
)
from performers.models.arguments import CACHE_KEYWORD, CACHE_KEYWORDS, cache_keyword
from tests.models.cases import TOLERANCE, build, causal_model, masked_model, tokens


def flattened(*lengths):
    """A batch of transformers' padding-free collator, and its sequences."""
    rows = [{"input_ids": tokens(1, n)[0].tolist()} for n in lengths]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate(rows)
    batch.pop("labels")
    batch["seq_idx"] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    return batch, [torch.tensor([row["input_ids"]]) for row in rows]


def past(name="favor-softmax", rows=1, length=3, **options):
    return causal_model(name, **options)(tokens(rows, length), use_cache=True).past_key_values


def test_the_name_of_the_cache_is_that_of_the_installed_transformers():
    generate = transformers.GenerationMixin.prepare_inputs_for_generation
    assert CACHE_KEYWORD in inspect.signature(generate).parameters
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
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cache = model(ids[:, :6], use_cache=True).cache
    got = model.generate(ids, **options, **{name: cache})
    assert torch.equal(got, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("make", [causal_model, masked_model])
@pytest.mark.parametrize(
    "names",
    [
        ("position_ids",),
        ("cu_seq_lens_q", "cu_seq_lens_k"),
        ("position_ids", "seq_idx"),
        ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"),
    ],
)
def test_padding_free_batches_keep_sequences_apart(make, names):
    model = make()
    batch, rows = flattened(7, 1, 5)
    got = model(batch["input_ids"], **{name: batch[name] for name in names}).logits
    torch.testing.assert_close(got, torch.cat([model(x).logits for x in rows], 1), **TOLERANCE)


def test_positions_with_gaps_are_those_of_one_sequence():
    model, ids = masked_model(), tokens(1, 6)
    options = {"position_ids": torch.tensor([[0, 1, 2, 7, 8, 20]])}
    want = model(ids, **options, attention_mask=torch.ones(1, 6)).logits
    torch.testing.assert_close(model(ids, **options).logits, want, **TOLERANCE)
    # Beside a mask they may be of any kind.
    model(ids, position_ids=FALLING, attention_mask=torch.ones(1, 6))


@pytest.mark.parametrize("name", ["encoder_hidden_states", "token_type_ids", "state"])
@pytest.mark.parametrize("make", [causal_model, masked_model])
def test_unknown_arguments_are_refused(make, name):
    with pytest.raises(TypeError, match=f"does not know the argument.*{name}"):
        make()(tokens(1, 4), **{name: torch.zeros(1, 4)})
    make()(tokens(1, 4), **{name: None})


TWO_ROWS = partial(past, rows=2)
ROW = {"input_ids": tokens(1, 6)}
FALLING = torch.tensor([[0, 1, 2, 1, 2, 3]])
ELSEWHERE = (
    "is the cache of a model with attention=.*, . layers and exact_layers=.*, but this one has "
    r"'favor-softmax', 2 and \(\)"
)
PACKED = flattened(3, 3)[0]
# Arguments of a call on two rows of six tokens, where functions stand for what they return, and
# words of the error.
CAUSAL = [
    ({"cache": past, "past_key_values": past}, "cache and past_key_values name the same argument"),
    (
        {"input_ids": tokens(1, 1), "position_ids": torch.tensor([[7]])},
        f"no cache of the tokens before it: pass {CACHE_KEYWORD}",
    ),
    (
        {"cache": TWO_ROWS, "cache_position": torch.arange(9, 15)},
        "cache_position begins at 9, but the cache holds 3",
    ),
    ({"past_key_values": DynamicCache()}, "must be the PerformerCache"),
    ({"past_key_values": ((torch.zeros(1),) * 2,)}, "must be the PerformerCache"),
    *(
        ({"past_key_values": partial(past, other, rows=2)}, ELSEWHERE)
        for other in ("favor-relu", "exact", "hybrid", "hybrid, outer")
    ),
    *(
        (
            {"past_key_values": partial(past, rows=rows)},
            rf"past_key_values holds {rows} row\(s\) but the input has 2",
        )
        for rows in (1, 3)
    ),
    (
        {"sequence_ids": torch.zeros(2, 6), "past_key_values": TWO_ROWS},
        "packed sequences.*cannot be combined with past_key_values",
    ),
    (
        {"past_key_values": TWO_ROWS, "attention_mask": torch.ones(2, 5)},
        r"shape \(2, 6\) or \(2, 9\), got \(2, 5\)",
    ),
    (
        {**PACKED, "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])},
        "tell different boundaries",
    ),
]
MASKED = [
    ({"inputs_embeds": torch.zeros(2, 6, 32)}, "exactly one of input_ids and inputs_embeds"),
    ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
    ({"past_key_values": TWO_ROWS}, "past_key_values needs a causal model"),
    *(
        ({"attention_mask": torch.ones(shape)}, r"attention_mask must have shape \(2, 6\), got")
        for shape in ((2, 5), (1, 6), (2, 7), (2, 1, 6, 6))
    ),
    *(
        ({"attention_mask": torch.tensor([values] * 2)}, "attention_mask must be bool or hold 0")
        for values in ((0.0, -1e4) * 3, (1, 2) * 3)
    ),
    ({"sequence_ids": torch.zeros(1, 6)}, r"sequence_ids must have shape \(2, 6\), got \(1, 6\)"),
    (
        {**ROW, "cu_seq_lens_q": torch.tensor([0, 2, 5])},
        r"cu_seq_lens_q must run from 0 to the length of a single row \(6\), got \(3,\) offsets",
    ),
    ({"position_ids": FALLING}, "do not tell where packed sequences begin"),
]
ANSWERS = partial(build, PerformerForQuestionAnswering)
OTHERS = [
    (
        partial(masked_model, "window and sinks"),
        {**PACKED, "output_attentions": True},
        "output_attentions is not available for packed sequences with sinks",
    ),
    (partial(build, PerformerForSequenceClassification), PACKED, "answers once for each row"),
    (ANSWERS, PACKED, "answers once for each row"),
    (ANSWERS, {"start_positions": torch.tensor([1, 2])}, "pass both start_positions and end_"),
]


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        *((causal_model, *case) for case in CAUSAL),
        # The base model has a cache among its arguments, too.
        *((lambda: masked_model().performer, *case) for case in MASKED),
        *OTHERS,
    ],
)
def test_calls_that_are_refused(make, arguments, words):
    arguments = {name: x() if callable(x) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=words):
        make()(**{"input_ids": tokens(2, 6), **arguments})


def test_a_step_at_the_start_needs_no_past():
    causal_model()(tokens(1, 1), position_ids=torch.tensor([[0]]))
    causal_model()(tokens(1, 1), cache_position=torch.tensor([0]))
