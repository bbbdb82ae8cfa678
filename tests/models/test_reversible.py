"""Reversible residual blocks: the function, exact gradients, memory, and everything around."""

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn import functional as F

from performers import redraw_features_
from performers.models import PerformerForMaskedLM
from tests.models.cases import (
    KINDS,
    PLAIN,
    SIGNED,
    TOLERANCE,
    assert_same,
    build,
    gradients,
    make_model,
    masked_model,
    right_padded,
    tokens,
)
from tests.models.memory import HeldBytes

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)


def reversible(name="favor-softmax", is_causal=False, **options):
    """A language model in float64, in training."""
    return make_model(name, is_causal, reversible=True, **options).train()


def in_float32(name="favor-softmax", **options):
    options = {"initializer_range": 0.02, "hidden_dropout_prob": 0.1, **options}
    return build(PerformerForMaskedLM, name, reversible=True, **options).train()


def by_hand(model, ids):
    """The two streams, written down, for a model without masks."""
    context, position_ids = model._context(model.embeddings(ids), None, None, None, None, False)
    x1 = x2 = model._with_positions(model.embeddings(ids), position_ids)
    for block in model.layers:
        y1 = x1 + block.attention(block.attention_norm(x2), context)[0]
        inner = F.gelu(block.mlp_input(block.mlp_norm(y1)))
        x1, x2 = y1, x2 + block.mlp_output(inner)
    return model.final_norm((x1 + x2) / 2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("name", "is_causal"), [("favor-softmax", False), ("exact", True)])
def test_the_function(name, is_causal, grad):
    model = reversible(name, is_causal, num_hidden_layers=3).performer
    ids = tokens(2, 20)
    with torch.set_grad_enabled(grad):
        out = model(ids).last_hidden_state
    torch.testing.assert_close(out, by_hand(model, ids), **TOLERANCE)
    plain = make_model(name, is_causal, num_hidden_layers=3).performer
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert (plain(ids).last_hidden_state - out).abs().max() > 1e-2


def both_ways(model, ids, call=None, **options):
    """Loss, gradients and random numbers, of reversible blocks and of autograd.

    Hidden states that are asked for make the model keep all activations. ``call`` computes loss
    and backward pass from a function that gives the loss.
    """
    mask = options.get("attention_mask")
    # The embedding of padding is zero, where some kernels have a kink.
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    found = []
    for keep in (False, True):
        torch.manual_seed(7)

        def loss_of(keep=keep):
            out = model(ids, labels=labels, output_hidden_states=keep, **options)
            assert (out.hidden_states is None) != keep
            return out.loss

        if call is None:
            loss = loss_of()
            after = torch.rand(3)
            torch.manual_seed(8)
            loss.backward()
        else:
            loss, after = call(loss_of), None
        # The backward pass draws nothing of its own.
        found.append((loss.detach(), gradients(model), after, torch.rand(3)))
    return found


def assert_equal_ways(found, **tolerance):
    (loss, some, *drawn), (expected_loss, expected, *expected_drawn) = found
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0)
    scales = {name: max(x.abs().max().item(), 1e-3) for name, x in expected.items()}
    assert_same(
        {name: x / scales[name] for name, x in some.items()},
        {name: x / scales[name] for name, x in expected.items()},
        **tolerance,
    )
    for one, other in zip(drawn, expected_drawn, strict=True):
        assert torch.equal(one, other)


def assert_near(found, error):
    """Gradients within a relative error in the norm."""
    (loss, some, *_), (expected_loss, expected, *_) = found
    assert loss == expected_loss
    assert some.keys() == expected.keys()
    for name, gradient in expected.items():
        assert some[name].dtype == gradient.dtype
        distance = (some[name] - gradient).float().norm() / gradient.float().norm()
        assert distance < error, name


@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
@KINDS
@pytest.mark.parametrize("name", PLAIN)
def test_gradients_are_those_of_autograd(name, is_causal, kind):
    """In float64, through six layers with dropout (two for kernels of both signs)."""
    model = reversible(
        name,
        is_causal,
        num_hidden_layers=2 if name in SIGNED else 6,
        hidden_dropout_prob=0.2,
        initializer_range=0.1,
    )
    ids, options = tokens(2, 12), {}
    if kind == "masked":
        ids, options["attention_mask"] = right_padded([ids[0], ids[1, :7]])
    if kind == "packed":
        options["sequence_ids"] = torch.tensor([[0] * 5 + [1] * 7, [0] * 11 + [1]])
    # Normalisers near zero make outputs so large that a sum with them loses what it held before.
    atol = 1e-4 if name in SIGNED else 1e-10
    assert_equal_ways(both_ways(model, ids, **options), rtol=1e-9, atol=atol)


@pytest.mark.parametrize("name", ["favor-softmax", "exact"])
def test_gradients_in_single_precision(name):
    """Twelve layers: what rounding in the reconstruction costs."""
    model = in_float32(name, num_hidden_layers=12)
    assert_equal_ways(both_ways(model, tokens(4, 40)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_streams_in_full_precision(dtype):
    model = in_float32(num_hidden_layers=8, hidden_dropout_prob=0.0).to(dtype)
    assert_near(both_ways(model, tokens(2, 30)), 0.05)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_autocast_is_replayed(inside):
    """Whether the backward pass runs inside the region or after it."""

    def call(loss_of):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return loss

    assert_near(both_ways(in_float32(num_hidden_layers=4), tokens(2, 30), call), 0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_of_an_accelerator_are_replayed():
    model = reversible(num_hidden_layers=6, hidden_dropout_prob=0.2).cuda()
    assert_equal_ways(both_ways(model, tokens(2, 12).cuda()), rtol=1e-8, atol=1e-9)


class Chosen(torch.nn.Module):
    """Values, or nothing: a choice that the context keeps."""

    threshold = 0.0

    def forward(self, query, key, value, context, layer):
        chosen = query.sum(-1, keepdim=True) > self.threshold
        return value * context.choices.setdefault(self, chosen), None


def test_choices_are_those_of_the_forward_pass(monkeypatch):
    """Rounding may change any; here all would be others."""
    model, ids = reversible("exact", num_hidden_layers=4), tokens(2, 40)
    for block in model.performer.layers:
        block.attention.mechanism = Chosen()
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    expected = gradients(model)
    monkeypatch.setattr(Chosen, "threshold", torch.inf)
    # What was kept is kept for as long as the graph.
    loss.backward()
    assert_same(gradients(model), expected)
    model(ids, labels=ids).loss.backward()
    assert not gradients(model)["performer.layers.0.attention.output.weight"].any()


def test_a_module_in_training_inside_a_model_in_evaluation():
    """Dropout as it is used for estimates of uncertainty."""
    model = reversible(hidden_dropout_prob=0.3).eval()
    for block in model.performer.layers:
        block.dropout.train()
    ids = tokens(2, 12)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert_equal_ways(both_ways(model, ids), rtol=1e-8, atol=1e-9)


def test_hooks_inside_blocks_run_and_survive_a_failure():
    model, ids = reversible(), tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    calls = []

    def twice(gradient):
        calls.append(1)
        return 2 * gradient

    parameters = dict(model.performer.layers.named_parameters(prefix="performer.layers"))
    handles = [parameter.register_hook(twice) for parameter in parameters.values()]
    inside = []
    model.performer.layers[0].attention.register_forward_hook(lambda *_: inside.append(1))
    doubled = {name: (1 + (name in parameters)) * x for name, x in expected.items()}
    for _ in range(2):
        calls.clear()
        model(ids, labels=ids).loss.backward()
        assert len(calls) == len(parameters)
        assert_same(gradients(model), doubled, rtol=1e-7, atol=1e-7)
    # Hooks of modules inside a block run in both passes.
    assert len(inside) == 4

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("a failure")

    block = model.performer.layers[0]
    failing = block.mlp_output.register_forward_hook(lambda module, args, x: Failing.apply(x))
    with pytest.raises(RuntimeError, match="a failure"):
        model(ids, labels=ids).loss.backward()
    failing.remove()
    assert all(len(parameter._backward_hooks) == 1 for parameter in parameters.values())
    for handle in handles:
        handle.remove()
    calls.clear()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert not calls
    assert_same(gradients(model), expected, rtol=1e-7, atol=1e-7)


def change_weight(model):
    with torch.no_grad():
        model.performer.layers[0].mlp_output.weight.mul_(1.1)


def change_frozen_weight(model):
    model.performer.layers[0].mlp_output.weight.requires_grad_(False).mul_(1.1)


def replace_weight(model):
    layer = model.performer.layers[0].mlp_output
    layer.weight = torch.nn.Parameter(layer.weight.detach())


# Changes between the forward and the backward pass.
IN_PLACE = "modified by an inplace operation"
CHANGES = {
    "a weight": ("favor-softmax", change_weight, IN_PLACE),
    "a frozen weight": ("exact", change_frozen_weight, IN_PLACE),
    "another weight": ("exact", replace_weight, "replaced between the forward and the backward"),
    "features": ("favor-softmax", redraw_features_, IN_PLACE),
    "features of ReLU": ("favor-relu", redraw_features_, IN_PLACE),
    "a mode": (
        "favor-softmax",
        lambda model: model.performer.layers[1].dropout.eval(),
        r"train\(\) or eval\(\) was called between",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_before_the_backward_pass_are_refused(change):
    """All that computes the blocks is needed once more."""
    name, change, words = CHANGES[change]
    model, ids = reversible(name, hidden_dropout_prob=0.2), tokens(2, 9)
    loss = model(ids, labels=ids).loss
    change(model)
    with pytest.raises(RuntimeError, match=words):
        loss.backward()
    loss = model.train()(ids, labels=ids).loss
    model.lm_head.eval()
    loss.backward()


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
def test_hooks_of_blocks_are_refused(register):
    model = reversible()
    register(model.performer.layers[1])
    for grad in (False, True):
        refused = pytest.raises(ValueError, match=r"block 1 has hooks.*FSDP")
        with torch.set_grad_enabled(grad), refused:
            model(tokens(1, 4))
    plain = masked_model()
    register(plain.performer.layers[1])
    plain(tokens(1, 4))


def test_distributed_weights_are_refused(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = reversible()
        layer = model.performer.layers[1].mlp_input
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
        with pytest.raises(ValueError, match=r"parameters of block 1 are distributed tensors"):
            model(tokens(1, 4))
    finally:
        distributed.destroy_process_group()


def bytes_held(layers, **options):
    """By the graph of one loss, and at most over the forward and the backward pass."""
    model = build(
        PerformerForMaskedLM,
        num_hidden_layers=layers,
        hidden_dropout_prob=0.1,
        intermediate_size=128,
        **options,
    ).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = tokens(4, 256)
    with HeldBytes() as held:
        loss = model(ids, labels=ids).loss
        kept = held.now
        loss.backward()
    return kept, held.peak - sum(p.nbytes for p in model.parameters())


def test_depth_costs_no_activation_memory():
    shallow, deep = (bytes_held(n, reversible=True) for n in (2, 12))
    ordinary = [bytes_held(n) for n in (2, 12)]
    # Only states of the random number generators, 5 kB a branch, are kept for each block.
    assert deep[0] - shallow[0] < 1.1 * 20 * torch.get_rng_state().nbytes
    assert ordinary[1][0] > 4.5 * ordinary[0][0]
    assert ordinary[1][0] > 10 * deep[0]
    assert deep[1] < 1.3 * shallow[1]
    assert ordinary[1][1] > 3 * deep[1]


def test_gradients_of_inputs_and_of_some_parameters():
    """First derivatives: second ones are refused."""
    model = reversible(num_hidden_layers=3)
    embedded = model.get_input_embeddings()(tokens(2, 9)).detach().requires_grad_()
    for frozen in ([], ["mlp"], ["attention"], ["layers.1"], ["layers"]):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        found = []
        for keep in (False, True):
            out = model(inputs_embeds=embedded, output_hidden_states=keep).logits
            out.square().sum().backward()
            found.append({"inputs": embedded.grad.clone(), **gradients(model)})
            embedded.grad = None
        assert_same(*found, rtol=1e-8, atol=1e-9)
    loss = model(inputs_embeds=embedded).logits.square().sum()
    with pytest.raises(NotImplementedError, match="reversible=False"):
        torch.autograd.grad(loss, embedded, create_graph=True)


def test_gradient_checkpointing_is_refused():
    model, ids = reversible(), tokens(1, 4)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"reversible=True.*gradient_checkpointing_disable\(\)"):
        model(ids)
    model.eval()(ids)
    for layer in model.train().performer.layers:
        layer.gradient_checkpointing = False
    model(ids, labels=ids).loss.backward()
