"""Models learn, and gradient checkpointing changes nothing."""

import pytest
import torch

from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from tests.models.cases import (
    EVERY,
    MAIN,
    TOLERANCE,
    causal_model,
    gradients,
    make_config,
    make_model,
    masked_model,
    right_padded,
    tokens,
)

pytestmark = pytest.mark.filterwarnings(
    # Its successor is not in every release that is supported.
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)

KINDS = pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])


@KINDS
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attention", MAIN)
def test_gradient_checkpointing_changes_nothing(attention, use_reentrant, is_causal):
    model = make_model(attention, is_causal).train()
    ids, mask = right_padded([row[:n] for row, n in zip(tokens(2, 9), (9, 6), strict=True)])
    labels = ids.masked_fill(mask == 0, -100)

    def run():
        if use_reentrant:
            model.enable_input_require_grads()
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.detach(), gradients(model)

    plain_loss, plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in model.performer.layers)
    calls = []
    hook = model.performer.layers[0].mlp_norm.register_forward_hook(lambda *_: calls.append(1))
    loss, checkpointed = run()
    hook.remove()
    assert len(calls) == 2
    torch.testing.assert_close(loss, plain_loss, **TOLERANCE)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in checkpointed.items():
        torch.testing.assert_close(gradient, plain[name], **TOLERANCE, msg=name)


def test_gradient_checkpointing_of_packed_rows():
    model = masked_model().train()
    ids = tokens(2, 9)
    sequence_ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    losses = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        loss = model(ids, sequence_ids=sequence_ids, labels=ids).loss
        loss.backward()
        losses.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(losses[1], losses[0], **TOLERANCE)


def test_gradient_checkpointing_does_not_go_with_a_cache():
    model = causal_model().train()
    model.gradient_checkpointing_enable()
    assert model(tokens(1, 4), use_cache=True).past_key_values is None
    model.eval()
    past = model(tokens(1, 4)).past_key_values
    assert past is not None
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing cannot be combined"):
        model(tokens(1, 4), past_key_values=past)


def copying_losses(attention, steps):
    """Losses of learning to say eight letters again in order, one value a step."""
    torch.manual_seed(0)
    config = make_config(
        attention,
        hidden_size=64,
        intermediate_size=128,
        initializer_range=0.02,
        vocab_size=12,
        position_embedding="learned",
    )
    model = PerformerForCausalLM(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        half = torch.randint(4, 12, (32, 8), generator=generator)
        ids = torch.cat((half, half), dim=1)
        labels = ids.clone()
        labels[:, :8] = -100
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu", "exact"])
def test_models_learn_to_copy(attention):
    """Far beyond what letter frequencies give, which are uniform."""
    losses = copying_losses(attention, 60)
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:3]) / 3


def test_a_model_without_attention_cannot_copy():
    losses = copying_losses("identity", 60)
    assert min(losses) > 1.9


@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_a_few_steps_lower_the_loss(attention, is_causal):
    """Every mechanism fits one batch."""
    torch.manual_seed(0)
    model_class = PerformerForCausalLM if is_causal else PerformerForMaskedLM
    model = model_class(make_config(attention, initializer_range=0.02)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids, labels = tokens(4, 10), tokens(4, 10, seed=1)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = PerformerForMaskedLM(make_config(hidden_dropout_prob=0.5))
    ids = tokens(1, 8)
    model.train()
    assert (model(ids).logits != model(ids).logits).any()
    model.eval()
    torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("attention", MAIN)
def test_autocast(attention):
    torch.manual_seed(0)
    model = PerformerForMaskedLM(make_config(attention)).train()
    ids = tokens(2, 16)
    full = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids, labels=ids)
    half.loss.backward()
    assert half.logits.dtype == torch.bfloat16
    assert abs(half.loss.item() - full.item()) < 0.05
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
