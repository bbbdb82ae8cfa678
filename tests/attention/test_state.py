"""Full sequence = chunks resumed with a state = one step at a time; and the state as an object."""

import io

import pytest
import torch

from performers import FavorState
from tests.attention import oracle
from tests.attention.cases import (
    BACKENDS,
    BOTH,
    FEW,
    LINEAR,
    PLAIN,
    POSITIVE,
    STREAMED,
    VALUE_TOLERANCE,
    Configuration,
    assert_close_rows,
    check_against_oracle,
    exhaustive,
    law,
    make_call,
    random_mask,
    stream,
    trained,
)
from tests.features.cases import by_name, generator

LENGTH = 172
SPLITS = {
    "whole": [172],
    "odd": [1, 7, 64, 100],
    "even": [100, 64, 7, 1],
    "short": [3] * 57 + [1],
    "empty": [0, 70, 0, 102, 0],
    "steps": [1] * LENGTH,
    "prompt": [130] + [1] * 42,
}
TERMS = ((0, 0), (5, 4), (70, 66), (400, 0), (None, 400))
MORE_TERMS = ((0, 4), (5, 0), (64, 0), (64, 4))
WINDOWS = [
    PLAIN,
    *(Configuration(f"{window} and {sinks}", window, sinks) for window, sinks in TERMS),
    *(exhaustive(Configuration(f"{w} and {sinks}", w, sinks)) for w, sinks in MORE_TERMS),
]


def assert_same_state(first, second, tolerance=1e-5):
    """Equal sums, whatever scale each is kept at, and the same keys and values kept."""
    scale = torch.maximum(first.log_scale, second.log_scale).double()
    scale = scale.where(scale > -float("inf"), 0.0)
    sums = [
        (
            state.key_value.double() * (state.log_scale.double() - scale).exp().unsqueeze(-1),
            state.key_sum.double() * (state.log_scale.double() - scale).exp(),
        )
        for state in (first, second)
    ]
    for a, b in zip(*sums, strict=True):
        size = max(1.0, b.abs().max().item())
        assert (a - b).abs().max() <= tolerance * size
    for kind in ("recent", "sink"):
        kept = [state.exact_keys(kind) for state in (first, second)]
        if kept[0] is None:
            assert kept[1] is None
            continue
        mask = kept[0][2]
        assert torch.equal(mask, kept[1][2])
        for a, b in zip(*(x[:2] for x in kept), strict=True):
            # The content of a slot without a key does not matter.
            a, b = (x.where(mask[:, None, :, None], 0.0) for x in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def make_mask(kind):
    """None, or a mask of two rows whose first keys are at different places."""
    if kind == "unmasked":
        return None
    mask = random_mask(2, LENGTH, seed=1, share=0.6)
    mask[1] = torch.arange(LENGTH) >= 90
    if kind == "holes":
        mask[0, 20:90] = False
        mask[1, 95:165] = False
    else:
        mask[0] = torch.arange(LENGTH) >= 3
    return mask


@pytest.mark.parametrize("masking", ["unmasked", "left", "holes"])
@pytest.mark.parametrize(
    "split", [x if x in ("odd", "empty", "steps", "prompt") else exhaustive(x) for x in SPLITS]
)
@law(configurations=[*WINDOWS, STREAMED[-1]])
def test_pieces_equal_the_whole(backend, case, configuration, split, masking, device):
    """Values, gradients, and the states that backends leave."""
    call = make_call(case, LENGTH, "causal", configuration, seed=1, device=device)
    if masking != "unmasked":
        call.options["key_mask"] = make_mask(masking).to(device)
    gradients = split != "steps"
    states = []

    def run(call):
        out, state = stream(call, SPLITS[split], backend)
        states.append(state)
        return out

    check_against_oracle(call, backend, run=run, gradients=gradients)
    for name in {backend, "reference"}:
        whole, state = call.run(name, return_state=True)
        assert_same_state(states[0], state)
    expected, conditioning = call.expected()
    assert_close_rows(whole, expected, conditioning, VALUE_TOLERANCE)


@law(backends=LINEAR, configurations=STREAMED, cases=[POSITIVE, by_name("relu")])
def test_backends_read_each_others_states(backend, case, configuration):
    call = make_call(case, 60, "causal", configuration, seed=4)
    call.options.pop("key_mask", None)
    expected, conditioning = call.expected()
    halves = list(zip(*(x.split(30, dim=-2) for x in call.inputs), strict=True))
    for first, second in ((backend, "reference"), ("reference", backend)):
        _, state = call.with_inputs(*halves[0]).run(first, return_state=True)
        out = call.with_inputs(*halves[1]).run(second, state=state)
        assert_close_rows(out, expected[..., 30:, :], conditioning[..., 30:, :], VALUE_TOLERANCE)


@law(backends=LINEAR, configurations=WINDOWS)
def test_trained_projections(backend, configuration):
    """Sums of earlier calls have gradients with respect to projection and bias."""
    results = []
    for split in ([LENGTH], [64, 1, 7, 1, 99]):
        call = make_call(POSITIVE, LENGTH, "causal", configuration, num_heads=2, seed=3)
        call = trained(call).leaves()
        out, state = stream(call, split, backend)
        weight = torch.randn(out.shape, generator=generator(1))
        # At scale one: the scale itself is a constant to autograd.
        sums = (state.key_sum * state.log_scale.exp()).sum()
        leaves = [*call.inputs, *call.feature_map.parameters()]
        results.append(torch.autograd.grad((out * weight).sum() + sums, leaves))
    for wanted, got in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 5e-5 * max(wanted.abs().max(), 0.3)


@pytest.mark.parametrize("num_heads", [None, 2, 4])
@law(configurations=[PLAIN, FEW])
def test_grouped_heads_and_shapes(backend, configuration, num_heads):
    heads = {"heads": 4, "key_heads": 2, "num_heads": num_heads}
    call = make_call(POSITIVE, 80, "causal", configuration, seed=5, **heads)
    expected, conditioning = call.expected()
    out, state = stream(call, [30, 1, 49], backend)
    assert_close_rows(out, expected, conditioning, VALUE_TOLERANCE)
    heads = 4 if num_heads == 4 else 2
    shapes = {"key_value": (2, heads, 48, 8)}
    shapes |= dict.fromkeys(("key_sum", "log_scale"), (2, heads, 48))
    if configuration.exact:
        for kind, size in (("recent", 6), ("sink", 3)):
            shapes[f"{kind}_key"] = (2, heads, size, 16)
            shapes[f"{kind}_value"] = (2, heads, size, 8)
            shapes[f"{kind}_mask"] = (2, size)
            assert getattr(state, f"{kind}_mask").all()
    assert {name: x.shape for name, x in state._tensors().items()} == shapes


@pytest.mark.parametrize("configuration", [PLAIN, FEW], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_size(backend, dtype, configuration):
    """As large after hundreds of tokens as after one, or none; sums in float32 at least."""
    sizes = []
    for length in (0, 1, 4, 300):
        call = make_call(POSITIVE, length, "causal", configuration, batch=1, dtype=dtype)
        out, state = call.run(backend, return_state=True)
        assert out.dtype == dtype
        wide = torch.promote_types(dtype, torch.float32)
        assert {x.dtype for x in state.sums()} == {wide}
        held = state._tensors().values()
        # A view of the keys would keep all of them in memory, and in a saved file.
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in held)
        assert state.nbytes == sum(x.nbytes for x in held)
        sizes.append([(x.shape, x.dtype) for x in held])
    assert all(size == sizes[0] for size in sizes)
    assert configuration.exact or state.nbytes == 2 * 48 * (8 + 2) * wide.itemsize


@law(configurations=[PLAIN, BOTH])
def test_autocast_keeps_the_state_in_float32(backend, configuration):
    call = make_call(POSITIVE, 70, "causal", configuration)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = stream(call, [40, 1, 29], backend)
    assert state.key_value.dtype == torch.float32
    plain, _ = stream(call, [40, 1, 29], backend)
    assert torch.equal(out, plain.bfloat16())


@law(configurations=[PLAIN, FEW])
def test_reorder_as_beam_search_does(backend, configuration):
    call = make_call(POSITIVE, 60, "causal", configuration, batch=3, seed=6)
    mask = call.options["key_mask"] = random_mask(3, 60, seed=6)
    index = torch.tensor([2, 0, 0, 1])
    _, state = call.run(backend, return_state=True)
    before = state.clone()._tensors()
    assert state.reorder_(index) is state
    for name, x in state._tensors().items():
        assert torch.equal(x, before[name][index]), name
    later = make_call(POSITIVE, 20, "causal", configuration, batch=4, seed=7)
    later.feature_map = call.feature_map
    out = later.run(backend, state=state)
    joined = [
        torch.cat((x[index], y), dim=-2) for x, y in zip(call.inputs, later.inputs, strict=True)
    ]
    later.options["key_mask"] = torch.cat((mask[index], torch.ones(4, 20, dtype=torch.bool)), 1)
    expected, conditioning = oracle.attend(POSITIVE, call.feature_map, *joined, **later.options)
    assert_close_rows(out, expected[..., 60:, :], conditioning[..., 60:, :], VALUE_TOLERANCE)


@law(configurations=STREAMED)
def test_a_call_leaves_the_past_alone(backend, configuration):
    """States are not written to, and share no memory with the inputs of a call."""
    call = make_call(POSITIVE, 60, "causal", configuration)
    call.options.pop("key_mask", None)
    _, state = call.run(backend, return_state=True)
    before = state.clone()._tensors()
    for length in (1, 3, 60):
        rows = call.with_inputs(*(x[..., :length, :] for x in call.inputs))
        rows.run(backend, state=state, return_state=True)
    for x in call.inputs:
        x.fill_(float("nan"))
    for name, x in state._tensors().items():
        assert torch.equal(x, before[name]), name


@law(configurations=[PLAIN, FEW])
def test_detach_cuts_the_graph_and_clone_keeps_it(backend, configuration):
    call = make_call(POSITIVE, 80, "causal", configuration, batch=1, seed=8).leaves()
    expected = call.run(backend).detach()
    out, state = stream(call, [40, 40], backend, between=FavorState.detach)
    assert not any(x.requires_grad for x in state._tensors().values())
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(out[..., 40:, :].sum(), call.inputs)
    assert all((g[..., :40, :] == 0).all() for g in gradients)
    out, _ = stream(call, [40, 40], backend, between=FavorState.clone)
    # Row 40 sees the sinks, its window and, through features, the keys between.
    gradient = torch.autograd.grad(out[..., 40, :].square().sum(), call.value)[0]
    for position in (0, 1, 20, 34, 39):
        assert (gradient[..., position, :] != 0).any(), position


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_returned_state(backend):
    """A loss on the state reaches exactly the keys and values that it keeps, and no query."""
    call = make_call(POSITIVE, 70, "causal", batch=1, window=6, sinks=2).leaves()
    alone = call.with_inputs(call.query, call.key.detach(), call.value.detach())
    out, state = alone.run(backend, return_state=True)
    assert out.requires_grad
    assert not any(x.requires_grad for x in state._tensors().values())
    _, state = call.run(backend, return_state=True)
    loss = state.recent_key.square().sum() + 3 * state.sink_value.sum()
    key, value = torch.autograd.grad(loss, (call.key, call.value), retain_graph=True)
    torch.testing.assert_close(key[..., 64:, :], 2 * call.key.detach()[..., 64:, :])
    assert (key[..., :64, :] == 0).all()
    assert (value[..., :2, :] == 3).all()
    assert (value[..., 2:, :] == 0).all()
    key, value = torch.autograd.grad(state.key_value.square().sum(), (call.key, call.value))
    for gradient in (key, value):
        assert ((gradient != 0).any(-1) == (torch.arange(70) >= 2).logical_and(
            torch.arange(70) < 64
        )).all()  # fmt: skip


@pytest.mark.parametrize("length", [1, 129, *map(exhaustive, (64, 100))])
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "relu"])
@pytest.mark.parametrize("use", ["output", "key_sum", "key_value", "sums", "all"])
@pytest.mark.parametrize("backend", LINEAR)
def test_whatever_of_the_results_is_used(backend, use, name, length):
    """Output and sums each alone: what was not used is None to the backward pass."""
    sizes = {"heads": 4, "key_heads": 2, "num_features": 20}
    past, call = (make_call(by_name(name), n, "causal", seed=n, **sizes) for n in (40, length))
    call.feature_map = past.feature_map
    call.options["key_mask"] = random_mask(2, length, share=0.9)
    results = []
    for other, dtype in ((backend, torch.float32), ("torch", torch.float64)):
        _, state = past.leaves(dtype).run(other, return_state=True)
        state, ours = state.detach(), call.leaves(dtype)
        leaves = [*ours.inputs, state.key_value.requires_grad_(), state.key_sum.requires_grad_()]
        out, after = ours.run(other, state=state, return_state=True)
        loss = {
            "output": out.square().sum(),
            "key_sum": after.key_sum.square().sum(),
            "key_value": after.key_value.square().sum(),
            "sums": (after.key_value.sum(-1) * after.key_sum).sum(),
            "all": out.square().sum() + after.key_value.square().sum() + after.key_sum.sum(),
        }[use]
        options = {"allow_unused": True, "materialize_grads": True}
        results.append((loss, *torch.autograd.grad(loss, leaves, **options)))
    for a, b in zip(*results, strict=True):
        assert (a.double() - b).abs().max() <= 2e-4 * max(b.abs().max().item(), 1e-2)


@law(configurations=WINDOWS)
def test_a_state_that_has_seen_nothing(backend, configuration):
    """After masked tokens alone, or none, a call is as if it were the first."""
    call = make_call(POSITIVE, 70, "causal", configuration, seed=9)
    none = torch.zeros(2, 70, dtype=torch.bool)
    out, state = call.run(backend, key_mask=none, return_state=True)
    assert (out == 0).all()
    plain, plain_state = call.run(backend, return_state=True)
    empty = call.with_inputs(*(x[..., :0, :] for x in call.inputs))
    nothing, empty_state = empty.run(backend, return_state=True)
    assert nothing.shape == (2, 2, 0, 8)
    for before in (state, empty_state):
        resumed, resumed_state = call.run(backend, state=before, return_state=True)
        torch.testing.assert_close(resumed, plain, rtol=1e-6, atol=2e-6)
        assert_same_state(resumed_state, plain_state)
    _, after = empty.run(backend, state=plain_state, return_state=True)
    assert_same_state(after, plain_state)


@pytest.mark.parametrize("backend", LINEAR)
def test_an_absent_feature_does_not_set_the_scale(backend):
    """A state in which one feature has seen nothing, and the others only tiny features."""
    call = make_call(POSITIVE, 1, "causal", batch=1, heads=1, num_features=8)
    call.key = call.key * 0 + 40
    there = torch.arange(8) > 0
    state = FavorState(
        torch.randn(1, 1, 8, 8).where(there[:, None], 0.0),
        torch.ones(1, 1, 8).where(there, 0.0),
        torch.full((1, 1, 8), -200.0).where(there, -torch.inf),
    )
    mask = torch.zeros(1, 1, dtype=torch.bool)
    got, wanted = (call.run(name, state=state, key_mask=mask) for name in (backend, "reference"))
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@law(configurations=[PLAIN, FEW])
def test_keys_that_grow_and_shrink_along_the_stream(backend, configuration):
    """Scales rise with the longest feature and never lose the past to it; windows pass on keys."""
    call = make_call(POSITIVE, 160, "causal", configuration, batch=1, seed=12)
    call.key = call.key * torch.linspace(0, 12.6, 160).sin().abs()[:, None] * 3
    expected, conditioning = call.expected()
    for split in ([160], [37] * 3 + [1] * 49):
        assert_close_rows(stream(call, split, backend)[0], expected, conditioning, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_holds_the_last_keys_and_the_first(backend):
    call = make_call(POSITIVE, 50, "causal", batch=1, window=4, sinks=2)
    call.options["key_mask"] = torch.ones(1, 50, dtype=torch.bool)
    call.options["key_mask"][0, [0, 2, 47]] = False
    _, state = stream(call, [1, 1, 1, 45, 2], backend)
    taken = state.recent_mask[0]
    assert taken.sum() == 3
    for kept, x in ((state.recent_key, call.key), (state.recent_value, call.value)):
        assert torch.equal(kept[:, :, taken], x[:, :, [46, 48, 49]])
    for kept, x in ((state.sink_key, call.key), (state.sink_value, call.value)):
        assert torch.equal(kept, x[:, :, [1, 3]])


def test_states_are_copied_moved_saved_and_compared():
    call = make_call(POSITIVE, 40, "causal", FEW)
    _, state = call.run("torch", return_state=True)
    kept, cloned = {n: x.numpy().copy() for n, x in state._tensors().items()}, state.clone()
    assert all(x.device.type == "meta" for x in state.to("meta")._tensors().values())
    for x in cloned._tensors().values():
        x.zero_()
    for name, x in state.to("cpu")._tensors().items():
        assert (x.numpy() == kept[name]).all(), name
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, FavorState)
    for name, x in loaded._tensors().items():
        assert torch.equal(x, getattr(state, name)), name
    assert torch.equal(call.run(state=loaded), call.run(state=state))
    assert state == state
    assert loaded != state
