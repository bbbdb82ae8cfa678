"""Arguments of forward calls: the cache under both its names, packing, and what is refused."""

import inspect

import pytest
import torch
import transformers
from transformers import DynamicCache

from performers.models import (
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
    PerformerModel,
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
    model(ids, position_ids=torch.tensor([[0, 1, 2, 1, 2, 3]]), attention_mask=torch.ones(1, 6))


@pytest.mark.parametrize("name", ["encoder_hidden_states", "token_type_ids", "state"])
@pytest.mark.parametrize("make", [causal_model, masked_model])
def test_unknown_arguments_are_refused(make, name):
    with pytest.raises(TypeError, match=f"does not know the argument.*{name}"):
        make()(tokens(1, 4), **{name: torch.zeros(1, 4)})
    make()(tokens(1, 4), **{name: None})


def embedded(model, *shape):
    return torch.zeros(*shape, model.config.hidden_size, dtype=torch.float64)


# The model, the arguments of a call (or a function of the model), and the words of the error.
REFUSED = {
    "both names of the cache": (
        causal_model,
        lambda model: {"input_ids": tokens(1, 3), "cache": past(), "past_key_values": past()},
        "cache and past_key_values name the same argument",
    ),
    "ids and embeddings": (
        masked_model,
        lambda model: {"input_ids": tokens(1, 3), "inputs_embeds": embedded(model, 1, 3)},
        "exactly one of input_ids and inputs_embeds",
    ),
    "neither": (masked_model, {}, "exactly one of input_ids and inputs_embeds"),
    "a step without its past": (
        causal_model,
        {"input_ids": tokens(1, 1), "position_ids": torch.tensor([[7]])},
        f"no cache of the tokens before it: pass {CACHE_KEYWORD}",
    ),
    "a position that the cache does not have": (
        causal_model,
        lambda model: {
            "input_ids": tokens(1, 6),
            "cache": past(),
            "cache_position": torch.arange(9, 15),
        },
        "cache_position begins at 9, but the cache holds 3",
    ),
    "a cache of another class": (
        causal_model,
        {"input_ids": tokens(1, 3), "past_key_values": DynamicCache()},
        "past_key_values must be the PerformerCache",
    ),
    "a cache of pairs": (
        causal_model,
        {"input_ids": tokens(1, 3), "past_key_values": ((torch.zeros(1), torch.zeros(1)),)},
        "past_key_values must be the PerformerCache",
    ),
    **{
        f"the cache of another model, {other}": (
            causal_model,
            lambda model, other=other: {"input_ids": tokens(1, 3), "past_key_values": past(other)},
            "past_key_values is the cache of a model with.*exact_layers=.* but this one has "
            r"'favor-softmax', 2 and \(\)",
        )
        for other in ("favor-relu", "exact", "hybrid", "hybrid, outer")
    },
    **{
        f"the cache of {rows} row(s)": (
            causal_model,
            lambda model, rows=rows: {
                "input_ids": tokens(3, 3),
                "past_key_values": past(rows=rows),
            },
            rf"past_key_values holds {rows} row\(s\) but the input has 3",
        )
        for rows in (1, 2)
    },
    "a cache without causality": (
        lambda: build(PerformerModel),
        lambda model: {"input_ids": tokens(1, 3), "past_key_values": past()},
        "past_key_values needs a causal model",
    ),
    "a cache of packed sequences": (
        causal_model,
        lambda model: {
            "input_ids": tokens(1, 6),
            "sequence_ids": torch.zeros(1, 6),
            "past_key_values": past(),
        },
        "packed sequences.*cannot be combined with past_key_values",
    ),
    **{
        f"a mask of shape {shape}": (
            masked_model,
            {"input_ids": tokens(2, 6), "attention_mask": torch.ones(shape)},
            r"attention_mask must have shape \(2, 6\), got",
        )
        for shape in ((2, 5), (1, 6), (2, 7), (2, 1, 6, 6))
    },
    "a mask of a part of the past": (
        causal_model,
        lambda model: {
            "input_ids": tokens(2, 3),
            "past_key_values": past(rows=2, length=5),
            "attention_mask": torch.ones(2, 5),
        },
        r"shape \(2, 3\) or \(2, 8\), got \(2, 5\)",
    ),
    **{
        f"a mask of {values}": (
            masked_model,
            {"input_ids": tokens(1, 2), "attention_mask": torch.tensor([values])},
            "attention_mask must be bool or hold 0",
        )
        for values in ((0.0, -1e4), (1, 2))
    },
    "sequence_ids of another shape": (
        masked_model,
        {"input_ids": tokens(2, 6), "sequence_ids": torch.zeros(1, 6)},
        r"sequence_ids must have shape \(2, 6\), got \(1, 6\)",
    ),
    "offsets of another row": (
        masked_model,
        {"input_ids": tokens(1, 6), "cu_seq_lens_q": torch.tensor([0, 2, 5])},
        r"cu_seq_lens_q must run from 0 to the length of a single row \(6\), got \(3,\) offsets",
    ),
    "boundaries that contradict each other": (
        causal_model,
        lambda model: (
            flattened(6, 4)[0] | {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])}
        ),
        "tell different boundaries",
    ),
    "positions that fall to another place than 0": (
        masked_model,
        {"input_ids": tokens(1, 6), "position_ids": torch.tensor([[0, 1, 2, 1, 2, 3]])},
        "do not tell where packed sequences begin",
    ),
    "packed rows with sinks and matrices": (
        lambda: masked_model("window and sinks"),
        {
            "input_ids": tokens(1, 6),
            "sequence_ids": torch.tensor([[0] * 3 + [1] * 3]),
            "output_attentions": True,
        },
        "output_attentions is not available for packed sequences with sinks",
    ),
    **{
        f"packed rows of {head.__name__}": (
            lambda head=head: build(head),
            lambda model: flattened(5, 4)[0],
            "answers once for each row",
        )
        for head in (PerformerForSequenceClassification, PerformerForQuestionAnswering)
    },
    "one end of an answer": (
        lambda: build(PerformerForQuestionAnswering),
        {"input_ids": tokens(2, 9), "start_positions": torch.tensor([1, 2])},
        "pass both start_positions and end_positions",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_are_refused(case):
    make, arguments, words = REFUSED[case]
    model = make()
    arguments = arguments(model) if callable(arguments) else arguments
    with pytest.raises(ValueError, match=words):
        model(**arguments)


def test_a_step_at_the_start_needs_no_past():
    causal_model()(tokens(1, 1), position_ids=torch.tensor([[0]]))
    causal_model()(tokens(1, 1), cache_position=torch.tensor([0]))
