"""Gradients and dropout of converted models in training."""

import pytest
import torch

from performers.convert import to_performer
from tests.convert.architectures import (
    ARCHITECTURES,
    build,
    converted,
    inputs,
    token_ids,
)

ALL = list(ARCHITECTURES)


@pytest.mark.parametrize("name", ALL)
def test_every_weight_has_a_gradient_in_training(name):
    model = converted(build(name), num_features=16, window=2)
    model.train()
    reached = {n for n, p in _gradients(model, name).items() if p is not None}
    expected = {n for n, p in _gradients(build(name).train(), name).items() if p is not None}
    assert reached == expected
    assert len(reached) > 10


def _gradients(model, name):
    result = model(**inputs(name))
    out = result.logits if "logits" in result else result.last_hidden_state
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("bert", "attention_probs_dropout_prob"),
        ("albert", "attention_probs_dropout_prob"),
        ("distilbert", "attention_dropout"),
        ("modernbert", "attention_dropout"),
        ("gpt2", "attn_pdrop"),
        ("gpt_neox", "attention_dropout"),
        ("llama", "attention_dropout"),
        ("opt", "attention_dropout"),
        ("bart", "attention_dropout"),
        ("clip_vision", "attention_dropout"),
        ("dinov2", "attention_probs_dropout_prob"),
    ],
)
def test_dropout_of_weights_is_switched_off_with_a_warning(name, option):
    model = build(name, **{option: 0.3})
    with pytest.warns(UserWarning, match=r"dropout of attention weights \(0\.3\)") as caught:
        to_performer(model, num_features=16)
    assert caught[0].filename == __file__
    model.train()(**inputs(name))


def test_frozen_weights_stay_frozen_and_gradients_reach_the_inputs():
    model = build("llama").requires_grad_(False)
    linear = converted(model, num_features=16, window=2)
    assert not any(p.requires_grad for p in linear.parameters())
    embedded = linear.get_input_embeddings()(token_ids(1, 9)).requires_grad_()
    linear(inputs_embeds=embedded).logits.square().mean().backward()
    assert embedded.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = converted(build(name), num_features=16, window=2)
    model.train()
    plain = _gradients(model, name)
    plain = {n: None if g is None else g.clone() for n, g in plain.items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    for key, gradient in _gradients(model, name).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, plain[key])
