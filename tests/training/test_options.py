"""Options of a training run: defaults, ranges, and what makes two runs the same."""

import math

import pytest
import torch

from performers.app.errors import UserError
from performers.proteins.inputs.tokenizer import build_protein_tokenizer
from performers.training.options import TrainingOptions

CARRIED = {"objective": "clm", "carry_state": True}
OUT_OF_RANGE = {
    "objective": ["lm"],
    "estimator": ["best", "data_aware"],
    "position_embedding": ["none"],
    "hidden_size": [0, 100],
    "num_heads": [0, 3, 256],
    **{name: [0] for name in ("num_layers", "intermediate_size", "num_features", "accumulation")},
    **{name: [0] for name in ("eval_steps", "save_steps", "log_steps")},
    **{name: [-1] for name in ("redraw_steps", "warmup_steps", "window", "feed_forward_chunk")},
    "max_length": [2, 10_000],
    "batch_tokens": [0, 1000],
    "steps": [0, -5],
    "sequence_parallel": [0],
    "seed": [-1, 2**32],
    "dropout": [1.0, -0.1, math.nan],
    "mask_probability": [0.0, 1.5],
    "validation_fraction": [1.0, -0.5],
    "optimizer": ["sgd"],
    "learning_rate": [-1.0, math.nan],
    "weight_decay": [-1.0],
    "max_grad_norm": [math.nan],
    "across_sequences": [True],
    "attention": ["linear"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_an_option_out_of_range_is_an_error_that_names_its_flag(name, value):
    with pytest.raises(UserError) as caught:
        TrainingOptions(**{name: value})
    assert TrainingOptions.flag(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "num_attention_heads" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (
            {"attention": "exact", "window": 8},
            "--window needs --attention favor-softmax, got --attention exact",
        ),
        ({"attention": "favor-relu", "estimator": "hyperbolic"}, "--estimator needs --attention"),
        ({"estimator": "hyperbolic", "num_features": 33}, "--num-features must be a positive even"),
        ({"attention": "exact", "sequence_parallel": 2}, "--sequence-parallel needs --attention"),
        ({"sequence_parallel": 2, "optimizer": "muon"}, "--optimizer muon needs whole matrices"),
        ({"fsdp": True, "optimizer": "muon"}, "use --optimizer adamw"),
        ({"objective": "clm", "mask_probability": 0.2}, "--mask-probability needs --objective"),
        ({"objective": "clm", "position_window": 2}, "--position-window needs --objective mlm"),
        ({"reversible": True, "gradient_checkpointing": True}, "--gradient-checkpointing"),
        ({"carry_state": True}, "--carry-state needs --objective clm"),
        ({**CARRIED, "memory": 8}, "--memory needs --attention exact"),
        ({"memory": 8, "attention": "exact"}, "--memory needs --carry-state"),
        ({"alone": 0.5}, "--alone needs --families"),
        ({"families": "all", "packed": True}, "--families cannot be combined with --packed"),
        ({"family_power": -1.0, "packed": True}, "--family-power cannot be combined with --packed"),
        ({"position_window": 2, "sequence_parallel": 2}, "combined with --sequence-parallel"),
        ({**CARRIED, "attention": "exact"}, "with --attention exact needs --memory"),
        ({**CARRIED, "reversible": True}, "cannot be combined with --reversible"),
        ({**CARRIED, "position_embedding": "learned"}, "use --positions rotary"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options, shown):
    with pytest.raises(UserError) as caught:
        TrainingOptions(**options)
    assert shown in str(caught.value)
    assert "\n" not in str(caught.value)


def test_to_make_options_draws_nothing():
    before = torch.random.get_rng_state()
    TrainingOptions(attention="favor-relu")
    # An option at its default needs nothing.
    TrainingOptions(attention="exact", estimator="positive", sequence_parallel=1)
    TrainingOptions(estimator="trigonometric", num_features=34)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_the_model_is_configured_as_asked(objective):
    options = TrainingOptions(
        objective=objective,
        hidden_size=24,
        num_layers=5,
        num_heads=3,
        num_features=17,
        window=16,
        reversible=True,
        feed_forward_chunk=64,
        position_embedding="learned",
        dropout=0.25,
        max_length=99,
    )
    tokenizer = build_protein_tokenizer()
    config = options.model_config(tokenizer)
    assert config.is_decoder is (objective == "clm")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 5, 3)
    assert (config.intermediate_size, config.num_features) == (96, 17)
    assert (config.position_embedding, config.max_position_embeddings) == ("learned", 99)
    assert config.hidden_dropout_prob == 0.25
    assert (config.window, config.reversible, config.chunk_size_feed_forward) == (16, True, 64)
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    other = TrainingOptions(attention="favor-relu").model_config(tokenizer)
    assert (other.attention, other.window) == ("favor-relu", None)


def test_what_changes_the_result_makes_another_run():
    """Options of logging change no result; the type is one setting under either flag."""
    first = TrainingOptions().to_dict()
    assert TrainingOptions(log_steps=7, eval_steps=3, save_steps=2).differences(first) == []
    assert TrainingOptions(num_layers=3, learning_rate=0.5).differences(first) == [
        "--layers was 4, now 3",
        "--learning-rate was 0.001, now 0.5",
    ]
    mixed = TrainingOptions(dtype="bfloat16")
    assert mixed.differences(TrainingOptions(bf16=True).to_dict()) == []
    assert mixed.differences(first) == ["--dtype was float32, now bfloat16"]
    # An option newer than the record was at its default.
    del first["optimizer"]
    assert TrainingOptions().differences(first) == []
    changed = TrainingOptions(optimizer="muon").differences(first)
    assert changed == ["--optimizer was adamw, now muon"]
