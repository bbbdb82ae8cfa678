"""Models that call ``scaled_dot_product_attention`` themselves, made linear by an example."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from performers import redraw_features_
from performers.convert import to_performer
from performers.convert.families.sdpa import SdpaAttention
from tests.convert.models import favors
from tests.convert.sdpa_models import (
    GPT,
    HEADS,
    LENGTH,
    WIDTH,
    Block,
    ImageAttention,
    ViT,
    build,
    example,
    heads,
)

CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
PADDING = torch.arange(LENGTH) < torch.tensor([[24], [15]])


def convert(model, inputs, **options):
    options = {"num_features": 16, "generator": torch.Generator().manual_seed(2), **options}
    return to_performer(copy.deepcopy(model), example=inputs, **options)


def error(model, exact, x):
    with torch.no_grad():
        expected = exact(x)
        return float((model(x) - expected).norm() / expected.norm())


KINDS = pytest.mark.parametrize("kind", [GPT, ViT])


@KINDS
def test_a_covering_window_is_exact_and_features_approximate(kind):
    exact, x = build(kind), example(kind)
    assert error(convert(exact, x, window=LENGTH), exact, x) < 1e-6
    named = {"ids" if kind is GPT else "image": x}
    assert error(convert(exact, named, window=LENGTH), exact, x) < 1e-6
    errors = [error(convert(exact, (x,), num_features=m), exact, x) for m in (8, 128, 2048)]
    assert errors[0] > 1.3 * errors[1] > 2 * errors[2] > 1e-3


@KINDS
def test_gradients_are_those_of_exact_attention(kind):
    exact, x = build(kind), example(kind)
    gradients = []
    for model in (exact, convert(exact, x, window=LENGTH)):
        model(x).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@KINDS
def test_saved_and_loaded(kind):
    x = example(kind)
    linear = convert(build(kind), x, window=3)
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    fresh = convert(build(kind), x, window=3, generator=None)
    assert not torch.equal(fresh(x), linear(x))
    fresh.load_state_dict(torch.load(file))
    for other in (fresh, copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(other(x), linear(x))
        assert len(favors(other)) == 2
        assert all(
            type(a) is type(b) for a, b in zip(other.modules(), linear.modules(), strict=True)
        )
    # The copies have features of their own.
    redraw_features_(linear)
    assert not torch.equal(fresh(x), linear(x))


def test_compiled_as_one_graph():
    x = example(GPT)
    linear = convert(build(GPT), x, window=3)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), linear(x))
    compiled(x).sum().backward()
    attention = next(x for x in linear.modules() if hasattr(x, "favor"))
    assert next(attention.parameters()).grad.abs().sum() > 0


def test_calibrated_features_and_listed_keys():
    exact, x = build(GPT), example(GPT)
    batches = [example(GPT, seed) for seed in (3, 4)]
    fitted = {"estimator": "data_aware", "window": 2, "calibration": batches, "num_features": 64}
    with pytest.raises(ValueError, match="pass calibration"):
        convert(exact, x, estimator="data_aware")
    ours = error(convert(exact, x, **fitted), exact, x)
    assert ours < error(convert(exact, x, window=2, num_features=64), exact, x)
    assert error(convert(exact, x, **fitted, listed_keys=8), exact, x) < ours


def test_the_example_leaves_the_model_and_its_mode_alone():
    model = build(ViT).train()
    before = copy.deepcopy(model.state_dict())
    linear = to_performer(model, example=example(ViT), num_features=8)
    assert linear is model
    assert model.training
    after = {k: v for k, v in model.state_dict().items() if "favor" not in k}
    torch.testing.assert_close(after, before)
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())
    assert all(x.training for x in model.modules())


@pytest.mark.parametrize(
    "mask",
    [
        PADDING[:, None, None],
        PADDING[:, None, None].expand(-1, -1, LENGTH, -1).clone(),
        CAUSAL,
        CAUSAL & PADDING[:, None, None],
        PADDING[:, None, None] & PADDING[:, None, :, None],
    ],
    ids=range(5),
)
def test_masks(mask):
    exact, x = build(lambda: Block(ImageAttention())), torch.randn(2, LENGTH, WIDTH)
    linear = convert(exact, (x, mask), window=LENGTH)
    torch.testing.assert_close(linear(x, mask), exact(x, mask), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x), exact(x), rtol=1e-5, atol=1e-5)


def test_a_compiled_mask_is_checked_by_its_meaning_in_the_example():
    x = torch.randn(2, LENGTH, WIDTH)
    linear = convert(build(lambda: Block(ImageAttention())), (x, CAUSAL))
    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, CAUSAL), linear(x, CAUSAL))
    assert not torch.allclose(linear(x, CAUSAL), linear(x), atol=1e-3)
    with pytest.raises(RuntimeError, match="attn_mask must be bool and mean"):
        compiled(x, CAUSAL.T)


def test_a_bias_is_refused():
    exact, x = Block(ImageAttention()), torch.randn(2, LENGTH, WIDTH)
    with pytest.raises(ValueError, match=r"attention \(ImageAttention\) called .* must be bool"):
        convert(exact, (x, torch.randn(LENGTH, LENGTH)))
    linear = convert(exact, x)
    with pytest.raises(ValueError, match="attn_mask must be bool and mean padding"):
        linear(x, CAUSAL.T)


class Decoder(nn.Module):
    """Self-attention and attention to a memory, in modules of their own or in one."""

    def __init__(self, shared=False):
        super().__init__()
        self.attend = nn.ModuleList([Pair()] if shared else [Pair(), Pair()])

    def forward(self, x, memory):
        x = x + self.attend[0](x, x)
        return x + self.attend[-1](x, memory)


class Pair(nn.Module):
    def forward(self, x, y):
        out = F.scaled_dot_product_attention(heads(x), heads(y), heads(y))
        return out.transpose(1, 2).flatten(2)


def test_cross_attention():
    exact, inputs = Decoder(), (torch.randn(2, LENGTH, WIDTH), torch.randn(2, 9, WIDTH))
    ours = convert(exact, inputs, window=LENGTH)
    assert isinstance(ours.attend[0].favor, SdpaAttention)
    assert type(ours.attend[1]) is Pair
    torch.testing.assert_close(ours(*inputs), exact(*inputs), rtol=1e-5, atol=1e-5)
    both = convert(exact, inputs, window=LENGTH, cross_attention=True, num_features=2048)
    assert both.attend[1].favor.window is None
    out, expected = both(*inputs), exact(*inputs)
    assert 1e-5 < float((out - expected).norm() / expected.norm()) < 0.2
    with pytest.raises(ValueError, match=r"several ways .*a module of its own"):
        convert(Decoder(shared=True), inputs)


def test_modules_within_modules():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Pair()

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x) + self.inner(x, x)

    exact, x = Outer(), torch.randn(2, LENGTH, WIDTH)
    ours = convert(exact, x, window=LENGTH)
    assert isinstance(ours.favor, SdpaAttention)
    assert ours.favor.feature_map.head_dim == WIDTH
    assert ours.inner.favor.feature_map.head_dim == WIDTH // HEADS
    torch.testing.assert_close(ours(x), exact(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"inner is inside the model, .* both or neither"):
        convert(exact, x, layers=[0])
    inner = convert(exact, x, layers=[1])
    assert not hasattr(inner, "favor")


def test_beside_multihead_attention():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.second = Block(ImageAttention())

        def forward(self, x):
            return self.second(x + self.first(x, x, x, need_weights=False)[0])

    exact, x = build(Mixed), torch.randn(2, LENGTH, WIDTH)
    fitted = {"estimator": "data_aware", "calibration": [x], "window": 3}
    ours = convert(exact, x, **fitted)
    assert [type(x).__name__ for x in favors(ours)] == ["PerformerAttention", "SdpaAttention"]
    assert error(convert(exact, x, window=LENGTH), exact, x) < 1e-6
    with pytest.raises(ValueError, match="listed_keys=4 is for"):
        convert(exact, x, listed_keys=4)


class MultiHead(nn.Module):
    """Attention by ``multi_head_attention_forward``, from all positions or from a few."""

    def __init__(self, queries=LENGTH):
        super().__init__()
        self.queries = queries
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x.transpose(0, 1)
        weights = self.into.weight, self.into.bias, None, None, False, 0.0
        out, _ = F.multi_head_attention_forward(
            x[: self.queries], x, x, WIDTH, HEADS, *weights,
            self.out.weight, self.out.bias, need_weights=False,
        )  # fmt: skip
        return out.transpose(0, 1)


def test_multi_head_attention_forward():
    exact, x = nn.Sequential(Block(ImageAttention()), MultiHead()), torch.randn(2, LENGTH, WIDTH)
    with pytest.raises(ValueError, match=r"1 \(MultiHead\) called .*multi_head_attention_forward"):
        convert(exact, x)
    ours = convert(exact, x, layers=[0], window=LENGTH)
    assert len(favors(ours)) == 1
    torch.testing.assert_close(ours(x), exact(x), rtol=1e-5, atol=1e-5)
    # Pooling is attention to another sequence, which stays exact.
    pooled = nn.Sequential(Block(ImageAttention()), MultiHead(queries=1))
    assert len(favors(convert(pooled, x))) == 1
    with pytest.raises(ValueError, match="multi_head_attention_forward"):
        convert(pooled, x, cross_attention=True)


def test_dropout_is_told_where_it_would_act():
    exact, x = build(GPT, dropout=0.5), example(GPT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear = convert(exact, x, window=LENGTH)
        assert error(linear, exact, x) < 1e-6
    with pytest.warns(UserWarning, match=r"dropout of attention weights \(0.5\) is switched off"):
        out = linear.train()(x)
    torch.testing.assert_close(out, exact(x), rtol=1e-5, atol=1e-5)


class Checkpointed(Pair):
    """Attention under a checkpoint within the module, which is recomputed outside it."""

    reentrant = False

    def forward(self, x, y):
        return checkpoint(super().forward, x, y, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant):
    x = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    linear, grads = convert(Decoder(), (x, x), window=2).attend[0], []
    for run in (linear, lambda *a: checkpoint(linear, *a, use_reentrant=reentrant)):
        (grad,) = torch.autograd.grad(run(x, x).square().sum(), x) if not reentrant else (None,)
        if reentrant:
            x.grad = None
            run(x, x).square().sum().backward()
            grad = x.grad
        grads.append(grad)
    torch.testing.assert_close(*grads)
    inside = convert(Checkpointed(), (x, x), window=2)
    inside.reentrant = reentrant
    # Recomputed exact attention would give another gradient without a word.
    with pytest.raises(RuntimeError, match="checkpoint"):
        inside(x, x).square().sum().backward()


def test_threads_do_not_see_each_other():
    exact, x = build(GPT), example(GPT)
    linear, results = convert(exact, x), {}
    expected = {"linear": linear(x), "exact": exact(x)}

    def run(name, model):
        results[name] = [model(x) for _ in range(20)]

    threads = [threading.Thread(target=run, args=a) for a in (("linear", linear), ("exact", exact))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, outs in results.items():
        assert len(outs) == 20
        assert all(torch.equal(out, expected[name]) for out in outs)


class NoAttention(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)


def own_forward():
    model = Pair()
    model.forward = model.forward
    return model


def taken():
    model = Pair()
    model.favor = 1
    return model


X = torch.randn(2, LENGTH, WIDTH)
CONVERSIONS = [
    (Pair, {}, "has nothing to convert: .* pass example="),
    (NoAttention, {"example": X}, "on the example no module called"),
    (own_forward, {"example": (X, X)}, r"the model \(Pair\) has a forward of its own"),
    (taken, {"example": (X, X)}, "has an attribute 'favor'.*rename it"),
    (Pair, {"example": (X, X), "layers": [1]}, r"layers must be in 0\.\.0"),
]


@pytest.mark.parametrize(("make", "options", "words"), CONVERSIONS)
def test_conversions_that_are_refused(make, options, words):
    model = make()
    kind, names = type(model), set(vars(model))
    with pytest.raises(ValueError, match=words):
        to_performer(model, **options)
    assert (type(model), set(vars(model))) == (kind, names)
    assert not model._forward_hooks


def test_other_refusals():
    linear = convert(Pair(), (X, X))
    with pytest.raises(ValueError, match="is converted already"):
        to_performer(linear, example=(X, X))
    with pytest.raises(TypeError, match="an example, must be a tensor"):
        to_performer(Pair(), example="x")
