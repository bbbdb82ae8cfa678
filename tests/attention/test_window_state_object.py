"""The state of a call with exact terms as an object: moved, copied, saved, refused."""

import io

import pytest
import torch

from performers import FavorState, SoftmaxFeatures, favor_attention
from tests.attention.cases import BACKENDS, TESTED, make_call, stream
from tests.attention.test_window_state import FIELDS
from tests.features.cases import by_name


def state_of(window=6, sinks=2, **options):
    """A call and the state after it."""
    call = make_call(by_name("positive"), 40, "causal", window=window, sinks=sinks, **options)
    return call, call.run("torch", return_state=True)[1]


def tensors(state):
    return {name: getattr(state, name) for name in FIELDS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_holds_the_last_keys_and_the_first(backend):
    call = make_call(by_name("positive"), 50, "causal", batch=1, window=4, sinks=2)
    call.options["key_mask"] = torch.ones(1, 50, dtype=torch.bool)
    call.options["key_mask"][0, [0, 2, 47]] = False
    _, state = stream(call, [1, 1, 1, 45, 2], backend)
    taken = state.recent_mask[0]
    assert taken.sum() == 3
    for kept, x in ((state.recent_key, call.key), (state.recent_value, call.value)):
        torch.testing.assert_close(kept[:, :, taken], x[:, :, [46, 48, 49]], rtol=0, atol=0)
    for kept, x in ((state.sink_key, call.key), (state.sink_value, call.value)):
        torch.testing.assert_close(kept, x[:, :, [1, 3]], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_size(backend, dtype):
    """As large after a thousand tokens as after one, or none; sums in float32 at least."""
    sizes = []
    for length in (0, 1, 4, 1000):
        call = make_call(by_name("positive"), length, "causal", batch=1, dtype=dtype)
        # Native kernels do not cover calls without rows.
        name = backend if length else None
        out, state = call.run(name, return_state=True, window=40, sinks=3)
        assert out.dtype == dtype
        wide = torch.promote_types(dtype, torch.float32)
        assert {state.key_value.dtype, state.key_sum.dtype, state.log_scale.dtype} == {wide}
        tensors = [getattr(state, name) for name in FIELDS]
        # A view of the keys would keep all of them in memory, and in a saved file.
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)
        sizes.append([(x.shape, x.dtype) for x in tensors])
    assert all(size == sizes[0] for size in sizes)


def test_nbytes_counts_every_tensor():
    _, state = state_of()
    assert state.nbytes == sum(x.nbytes for x in tensors(state).values())
    _, plain = state_of(window=None, sinks=0)
    assert state.nbytes > plain.nbytes == 2 * 2 * 48 * (8 + 2) * 4


def test_reorder_selects_rows_of_every_tensor():
    _, state = state_of(batch=3)
    before = tensors(state.clone())
    index = torch.tensor([2, 0, 0, 1])
    assert state.reorder_(index) is state
    for name, x in tensors(state).items():
        assert torch.equal(x, before[name][index]), name


def test_clone_shares_no_memory():
    _, state = state_of()
    kept, cloned = {n: x.numpy().copy() for n, x in tensors(state).items()}, state.clone()
    for x in tensors(cloned).values():
        x.zero_()
    for name, x in tensors(state).items():
        assert (x.numpy() == kept[name]).all(), name


def test_to_moves_every_tensor():
    _, state = state_of()
    assert all(x.device.type == "meta" for x in tensors(state.to("meta")).values())
    for name, x in tensors(state.to("cpu")).items():
        assert torch.equal(x, getattr(state, name)), name


@pytest.mark.parametrize("backend", TESTED)
def test_detach_cuts_the_graph_and_clone_keeps_it(backend):
    call = make_call(by_name("positive"), 80, "causal", batch=1, window=6, sinks=2).leaves()
    expected = call.run(backend).detach()
    out, state = stream(call, [40, 40], backend, between=FavorState.detach)
    assert not any(x.requires_grad for x in tensors(state).values())
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(out[..., 40:, :].sum(), call.inputs)
    assert all((g[..., :40, :] == 0).all() for g in gradients)
    out, _ = stream(call, [40, 40], backend, between=FavorState.clone)
    # The last row sees the sinks and, through features, what lies between; row 40 its window.
    gradient = torch.autograd.grad(out[..., 40, :].square().sum(), call.value)[0]
    for position in (0, 1, 20, 34, 39):
        assert (gradient[..., position, :] != 0).any(), position


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_returned_state(backend):
    """A loss on what the state keeps reaches exactly the keys and values that it keeps."""
    call = make_call(by_name("positive"), 70, "causal", batch=1, window=6, sinks=2).leaves()
    _, state = call.run(backend, return_state=True)
    (state.recent_key.square().sum() + 3 * state.sink_value.sum()).backward()
    torch.testing.assert_close(call.key.grad[..., 64:, :], 2 * call.key.detach()[..., 64:, :])
    assert (call.key.grad[..., :64, :] == 0).all()
    assert (call.value.grad[..., :2, :] == 3).all()
    assert (call.value.grad[..., 2:, :] == 0).all()


def test_states_are_saved():
    call, state = state_of()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, FavorState)
    for name, x in tensors(loaded).items():
        assert torch.equal(x, getattr(state, name)), name
    assert torch.equal(call.run(state=loaded), call.run(state=state))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_leaves_the_state_it_was_given_alone(backend):
    call, state = state_of()
    before = tensors(state.clone())
    for length in (1, 3, 40):
        rows = [x[..., :length, :] for x in call.inputs]
        favor_attention(
            *rows, call.feature_map, state=state, return_state=True, backend=backend, **call.options
        )
    for name, x in tensors(state).items():
        assert torch.equal(x, before[name]), name


def test_a_state_keeps_copies():
    """Writing into the tensors of a call afterwards does not reach the state it returned."""
    call, state = state_of()
    before = tensors(state.clone())
    for x in call.inputs:
        x.fill_(float("nan"))
    for name, x in tensors(state).items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize(
    ("made", "used", "match"),
    [
        ({"window": 6}, {"window": 5}, "window"),
        ({"window": 6}, {"window": 7}, "window"),
        ({"window": 6}, {}, "window"),
        ({}, {"window": 6}, "window"),
        ({"sinks": 2}, {"sinks": 3}, "sinks"),
        ({"sinks": 2}, {}, "sinks"),
        ({}, {"sinks": 2}, "sinks"),
        ({"window": 6, "sinks": 2}, {"window": 6}, "sinks"),
        ({"window": 6, "sinks": 2}, {"sinks": 2}, "window"),
        ({"window": 6, "sinks": 2}, {"window": 4, "sinks": 2}, "window"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_state_of_other_exact_terms_is_refused(backend, made, used, match):
    call = make_call(by_name("positive"), 10, "causal")
    _, state = call.run(backend, return_state=True, **made)
    with pytest.raises(ValueError, match=match):
        call.run(backend, state=state, **used)


@pytest.mark.parametrize("change", ["batch", "heads", "head_dim", "value_dim"])
def test_a_state_of_other_shapes_is_refused(change):
    call, state = state_of()
    sizes = {"batch": 2, "heads": 2, "head_dim": 16, "value_dim": 8}
    sizes[change] += 1
    other = make_call(by_name("positive"), 10, "causal", window=6, sinks=2, **sizes)
    features = SoftmaxFeatures(sizes["head_dim"], 48)
    with pytest.raises(ValueError, match="state must have"):
        favor_attention(*other.inputs, features, state=state, **call.options)


def test_a_state_on_another_device_is_refused():
    call, state = state_of()
    with pytest.raises(ValueError, match=r"state is on meta.*cpu.*\.to"):
        call.run(state=state.to("meta"))
