"""Reversible residual blocks: the function, exact gradients, memory, and everything around."""

import pytest
import torch

from performers import redraw_features_
from performers.models import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
)
from tests.models.cases import (
    CACHED,
    EVERY,
    TOLERANCE,
    causal_model,
    gradients,
    left_padded,
    make_config,
    make_model,
    masked_model,
    right_padded,
    tokens,
)
from tests.models.memory import HeldBytes

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)

# Kernels of both signs.
SIGNED = ("favor-tanh", "favor-gelu", "favor-identity")


def by_hand(model, ids):
    """The two streams, written down, for a model without masks."""
    context, position_ids = model._context(model.embeddings(ids), None, None, None, None, False)
    x1 = x2 = model._with_positions(model.embeddings(ids), position_ids)
    for block in model.layers:
        y1 = x1 + block.attention(block.attention_norm(x2), context)[0]
        inner = torch.nn.functional.gelu(block.mlp_input(block.mlp_norm(y1)))
        x1, x2 = y1, x2 + block.mlp_output(inner)
    return model.final_norm((x1 + x2) / 2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("attention", "is_causal"), [("favor-softmax", False), ("exact", True)])
def test_the_function(attention, is_causal, grad):
    model = make_model(attention, is_causal, reversible=True, num_hidden_layers=3).performer
    ids = tokens(2, 20)
    with torch.set_grad_enabled(grad):
        out = model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(out, by_hand(model, ids), **TOLERANCE)
    plain = make_model(attention, is_causal, num_hidden_layers=3).performer
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert (plain(ids, use_cache=False).last_hidden_state - out).abs().max() > 1e-2


def both_ways(model, ids, **options):
    """Loss and gradients as reversible blocks compute them, and as autograd does.

    Hidden states that are asked for make the model keep all activations.
    """
    mask = options.get("attention_mask")
    # The embedding of padding is zero, where some kernels have a kink.
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    found = []
    for keep in (False, True):
        torch.manual_seed(7)
        out = model(ids, labels=labels, output_hidden_states=keep, **options)
        after = torch.rand(3)
        torch.manual_seed(8)
        out.loss.backward()
        assert (out.hidden_states is None) != keep
        # The backward pass draws nothing of its own.
        found.append((out.loss.detach(), gradients(model), after, torch.rand(3)))
    return found


def assert_equal_ways(found, **tolerance):
    (loss, some, *drawn), (expected_loss, expected, *expected_drawn) = found
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0)
    assert some.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            some[name] / scale,
            gradient / scale,
            msg=lambda text, name=name: name + text,
            **tolerance,
        )
    for one, other in zip(drawn, expected_drawn, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_gradients_are_those_of_autograd(attention, is_causal, kind):
    """In float64, through six layers with dropout (two for kernels of both signs)."""
    model = make_model(
        attention,
        is_causal,
        reversible=True,
        num_hidden_layers=2 if attention in SIGNED else 6,
        hidden_dropout_prob=0.2,
        initializer_range=0.1,
    ).train()
    ids, options = tokens(2, 12), {}
    if kind == "masked":
        rows = [row[:size] for row, size in zip(ids, (12, 7), strict=True)]
        ids, options["attention_mask"] = right_padded(rows)
    if kind == "packed":
        options["sequence_ids"] = torch.tensor([[0] * 5 + [1] * 7, [0] * 11 + [1]])
    # Normalisers near zero make outputs so large that a sum with them loses what it held before.
    atol = 1e-4 if attention in SIGNED else 1e-10
    assert_equal_ways(both_ways(model, ids, **options), rtol=1e-9, atol=atol)


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu", "exact"])
def test_gradients_in_single_precision(attention):
    """Twelve layers: what rounding in the reconstruction costs."""
    torch.manual_seed(0)
    config = make_config(
        attention,
        reversible=True,
        num_hidden_layers=12,
        hidden_dropout_prob=0.1,
        initializer_range=0.02,
    )
    model = PerformerForMaskedLM(config).train()
    assert_equal_ways(both_ways(model, tokens(4, 40)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_streams_in_full_precision(dtype):
    torch.manual_seed(0)
    config = make_config(reversible=True, num_hidden_layers=8, initializer_range=0.02)
    model = PerformerForMaskedLM(config).to(dtype).train()
    (_, found, *_), (_, expected, *_) = both_ways(model, tokens(2, 30))
    for name, gradient in expected.items():
        assert found[name].dtype == dtype
        error = (found[name] - gradient).float().norm() / gradient.float().norm()
        assert error < 0.05, name


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_autocast_is_replayed(inside):
    """Whether the backward pass runs inside the region or after it."""
    torch.manual_seed(0)
    config = make_config(
        reversible=True, num_hidden_layers=4, hidden_dropout_prob=0.1, initializer_range=0.02
    )
    model = PerformerForMaskedLM(config).train()
    ids = tokens(2, 30)
    found = []
    for keep in (False, True):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ids, labels=ids, output_hidden_states=keep)
            assert out.logits.dtype == torch.bfloat16
            if inside:
                out.loss.backward()
        if not inside:
            out.loss.backward()
        found.append((out.loss.item(), gradients(model)))
    assert found[0][0] == found[1][0]
    assert (
        found[0][1].keys() == found[1][1].keys() == {name for name, _ in model.named_parameters()}
    )
    for name, gradient in found[1][1].items():
        assert found[0][1][name].dtype == torch.float32
        error = (found[0][1][name] - gradient).norm() / gradient.norm()
        assert error < 0.03, (name, error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_of_an_accelerator_are_replayed():
    model = masked_model(reversible=True, num_hidden_layers=6, hidden_dropout_prob=0.2)
    model = model.cuda().train()
    assert_equal_ways(both_ways(model, tokens(2, 12).cuda()), rtol=1e-8, atol=1e-9)


def test_a_module_in_training_inside_a_model_in_evaluation():
    """Dropout as it is used for estimates of uncertainty."""
    model = masked_model(reversible=True, hidden_dropout_prob=0.3).eval()
    for block in model.performer.layers:
        block.dropout.train()
    ids = tokens(2, 12)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert_equal_ways(both_ways(model, ids), rtol=1e-8, atol=1e-9)


def test_hooks_of_parameters_run_once():
    model = masked_model(reversible=True)
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    calls = []

    def twice(gradient):
        calls.append(1)
        return 2 * gradient

    parameters = dict(model.performer.layers.named_parameters(prefix="performer.layers"))
    handles = [parameter.register_hook(twice) for parameter in parameters.values()]
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        assert len(calls) == len(parameters)
        calls.clear()
        for name, gradient in gradients(model).items():
            factor = 2 if name in parameters else 1
            torch.testing.assert_close(gradient, factor * expected[name], msg=name)
    for handle in handles:
        handle.remove()
    model(ids, labels=ids).loss.backward()
    assert not calls
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_hooks_of_parameters_survive_a_failure():
    model = masked_model(reversible=True)
    parameter = model.performer.layers[0].mlp_input.weight
    parameter.register_hook(lambda gradient: 2 * gradient)
    ids = tokens(2, 9)
    loss = model(ids, labels=ids).loss

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("a failure")

    block = model.performer.layers[0]
    block.mlp_output.register_forward_hook(lambda module, args, out: Failing.apply(out))
    with pytest.raises(RuntimeError, match="a failure"):
        loss.backward()
    assert len(parameter._backward_hooks) == 1


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("attention", ["favor-softmax", "exact"])
def test_weights_that_change_before_the_backward_pass(attention, trained):
    """Frozen ones too: all are needed once more."""
    model = masked_model(attention, reversible=True)
    weight = model.performer.layers[0].mlp_output.weight.requires_grad_(trained)
    ids = tokens(2, 9)
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = model(ids, labels=ids).loss
    model.performer.layers[0].mlp_output.weight = torch.nn.Parameter(weight.detach() / 1.1)
    with pytest.raises(RuntimeError, match=r"replaced between the forward and the backward"):
        loss.backward()


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu"])
def test_features_that_are_redrawn_before_the_backward_pass(attention):
    model = masked_model(attention, reversible=True)
    ids = tokens(2, 9)
    loss = model(ids, labels=ids).loss
    redraw_features_(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(ids, labels=ids).loss.backward()


def test_modes_that_change_before_the_backward_pass():
    model = masked_model(reversible=True, hidden_dropout_prob=0.2).train()
    ids = tokens(2, 9)
    loss = model(ids, labels=ids).loss
    model.performer.layers[1].dropout.eval()
    with pytest.raises(RuntimeError, match=r"train\(\) or eval\(\) was called between"):
        loss.backward()
    loss = model.train()(ids, labels=ids).loss
    model.lm_head.eval()
    loss.backward()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "register",
    [
        lambda block: block.register_forward_hook(lambda *_: None),
        lambda block: block.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
        lambda block: block.register_full_backward_hook(lambda *_: None),
        lambda block: block.register_full_backward_pre_hook(lambda *_: None),
        lambda block: setattr(block, "forward", block.forward),
    ],
    ids=["forward", "before forward", "backward", "before backward", "replaced"],
)
def test_hooks_of_blocks_are_refused(register, grad):
    model = masked_model(reversible=True)
    register(model.performer.layers[1])
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"block 1 has hooks.*FSDP"):
        model(tokens(1, 4))
    plain = masked_model()
    register(plain.performer.layers[1])
    plain(tokens(1, 4))


def test_hooks_inside_blocks_run():
    model = masked_model(reversible=True)
    calls = []
    for block in model.performer.layers:
        block.attention.register_forward_hook(lambda *_: calls.append(1))
    ids = tokens(1, 4)
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2 * len(model.performer.layers)


def test_distributed_weights_are_refused(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = masked_model(reversible=True)
        layer = model.performer.layers[1].mlp_input
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
        with pytest.raises(ValueError, match=r"parameters of block 1 are distributed tensors"):
            model(tokens(1, 4))
    finally:
        distributed.destroy_process_group()


def bytes_held(layers, *, reversible, attention):
    """By the graph of one loss, and at most over the forward and the backward pass."""
    torch.manual_seed(0)
    config = make_config(
        attention,
        reversible=reversible,
        num_hidden_layers=layers,
        hidden_dropout_prob=0.1,
        intermediate_size=128,
    )
    model = PerformerForMaskedLM(config).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = tokens(4, 256)
    with HeldBytes() as held:
        loss = model(ids, labels=ids).loss
        kept = held.now
        loss.backward()
    weights = sum(p.nbytes for p in model.parameters())
    return kept, held.peak - weights


@pytest.mark.parametrize("attention", ["favor-softmax", "exact"])
def test_depth_costs_no_activation_memory(attention):
    shallow, deep = (bytes_held(n, reversible=True, attention=attention) for n in (2, 12))
    ordinary = [bytes_held(n, reversible=False, attention=attention) for n in (2, 12)]
    # Only states of the random number generators, 5 kB a branch, are kept for each block.
    assert deep[0] - shallow[0] < 1.1 * 20 * torch.get_rng_state().nbytes
    assert ordinary[1][0] > 4.5 * ordinary[0][0]
    assert ordinary[1][0] > 10 * deep[0]
    assert deep[1] < 1.3 * shallow[1]
    assert ordinary[1][1] > 3 * deep[1]


def test_the_backward_pass_can_run_twice():
    model = masked_model(reversible=True, hidden_dropout_prob=0.2).train()
    ids = tokens(2, 9)
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, once[name], rtol=0, atol=0)


def test_gradients_of_inputs_and_of_some_parameters():
    model = masked_model(reversible=True, num_hidden_layers=3)
    embedded = model.get_input_embeddings()(tokens(2, 9)).detach().requires_grad_()
    for frozen in ([], ["mlp"], ["attention"], ["layers.1"], ["layers"]):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        found = []
        for keep in (False, True):
            out = model(inputs_embeds=embedded, output_hidden_states=keep).logits
            out.square().sum().backward()
            found.append((embedded.grad.clone(), gradients(model)))
            embedded.grad = None
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-10)
        assert found[0][1].keys() == found[1][1].keys()
        for name, gradient in found[1][1].items():
            torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-8, atol=1e-9, msg=name)


def test_hidden_states_and_matrices():
    model = masked_model("exact", reversible=True, num_hidden_layers=3)
    ids = tokens(2, 9)
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4
    assert len(out.attentions) == 3
    torch.testing.assert_close(out.hidden_states[0], model.performer.embeddings(ids))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(out.logits, model(ids).logits, **TOLERANCE)
    # In training too: activations are then kept, and gradients are autograd's.
    model.train()(ids, labels=ids, output_attentions=True).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("attention", CACHED)
def test_pieces_equal_the_whole(attention):
    model = causal_model(attention, reversible=True)
    ids, mask = left_padded([tokens(1, size, seed=size)[0] for size in (13, 6)])
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    for grad in (False, True):
        cache, parts = None, []
        with torch.set_grad_enabled(grad):
            for part, own in zip(ids.split(5, dim=1), mask.split(5, dim=1), strict=True):
                out = model(part, attention_mask=own, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
        real = mask.bool()
        torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **TOLERANCE)
        assert cache.get_seq_length() == 13


def test_gradients_through_a_cache():
    model = causal_model(reversible=True).train()
    ids = tokens(2, 13)
    model(ids).logits.square().sum().backward()
    whole = gradients(model)
    first = model(ids[:, :8], use_cache=True)
    second = model(ids[:, 8:], past_key_values=first.past_key_values)
    torch.cat((first.logits, second.logits), dim=1).square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("attention", ["favor-softmax", "exact"])
def test_generation(attention):
    model = causal_model(attention, reversible=True, tie_word_embeddings=False, seed=3)
    ids = tokens(2, 9)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = model.generate(ids, **options)
    for _ in range(8):
        logits = model(ids, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(found, ids)


def test_gradient_checkpointing_is_refused():
    model = masked_model(reversible=True).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"reversible=True.*gradient_checkpointing_disable\(\)"):
        model(tokens(1, 4))
    model.eval()
    model(tokens(1, 4))
    for layer in model.train().performer.layers:
        layer.gradient_checkpointing = False
    model(tokens(1, 4), labels=tokens(1, 4)).loss.backward()


def test_models_are_saved_as_reversible(tmp_path):
    model = masked_model(reversible=True, chunk_size_feed_forward=3).float()
    model.save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path).eval()
    assert loaded.config.reversible is True
    assert loaded.config.chunk_size_feed_forward == 3
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_a_classifier_has_reversible_blocks_too():
    torch.manual_seed(0)
    model = PerformerForSequenceClassification(make_config(reversible=True, num_labels=3)).double()
    out = model(tokens(4, 9), labels=torch.tensor([0, 2, 1, 1]))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.exhaustive
def test_compiled_values_and_gradients():
    torch.compiler.reset()
    model = masked_model(reversible=True)
    ids = tokens(2, 20)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    wanted = gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    output = compiled(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, **TOLERANCE)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7, msg=name)
    torch.compiler.reset()


def test_reversible_models_learn():
    torch.manual_seed(0)
    model = PerformerForCausalLM(
        make_config(reversible=True, initializer_range=0.02, hidden_dropout_prob=0.05)
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids, labels = tokens(4, 10), tokens(4, 10, seed=1)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
