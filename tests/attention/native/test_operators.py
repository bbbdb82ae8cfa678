"""The operators of ``torch.library`` keep their contract, and parts of a row make up the whole."""

import pytest
import torch

from performers import LearnedFeatures, PerformerAttention, SoftmaxFeatures, favor_attention
from performers.attention.native.listed_operators import listed_backward, listed_forward
from performers.attention.native.operators import favor_backward, favor_forward
from performers.attention.torch_backend.listed import listed_pairs
from tests.attention.cases import (
    CASES,
    CONFIGURATIONS,
    MODES,
    PACKED,
    POSITIVE,
    SELF,
    Configuration,
    make_call,
    random_mask,
    trained,
)
from tests.attention.native.support import NATIVE, operator_arguments
from tests.features.cases import generator

pytestmark = NATIVE

EXACT = Configuration("exact", window=3, sinks=2)


def transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


CALLS = {
    "bidirectional": {},
    "causal": {"mode": "causal"},
    "cross": {"mode": "cross"},
    "rectified": {"name": "relu", "mode": "causal"},
    "rectified without projection": {"name": "deterministic-relu"},
    "bias": {"name": "bias"},
    "hyperbolic": {"name": "hyperbolic", "mode": "causal"},
    "without the norm": {"name": "exp-no-epsilon"},
    "packed": {"configuration": PACKED[0]},
    "packed, causal": {"mode": "causal", "configuration": PACKED[0]},
    "masked": {"key_mask": random_mask(2, 12)},
    "masked, causal": {"mode": "causal", "key_mask": random_mask(2, 12)},
    "grouped heads": {"key_heads": 2},
    "one projection a head": {"key_heads": 2, "num_heads": 2, "mode": "causal"},
    "final state": {"mode": "causal", "return_state": True},
    "state": {"mode": "causal", "resumed": True},
    "state to state": {"mode": "causal", "resumed": True, "return_state": True, "key_heads": 2},
    "rectified state": {"name": "relu", "mode": "causal", "resumed": True, "return_state": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, causal": {"dtype": torch.float16, "mode": "causal"},
    "transposed": {"how": transposed, "key_heads": 2},
    "transposed, causal": {"how": transposed, "mode": "causal"},
    "every other column": {"how": lambda x: x.repeat_interleave(2, -1)[..., ::2]},
    "exact": {"configuration": EXACT},
    "exact, causal": {"configuration": EXACT, "mode": "causal"},
    "exact, packed": {"configuration": PACKED[1]},
    "exact, packed, causal": {"configuration": PACKED[1], "mode": "causal"},
    "exact state": {
        "configuration": EXACT,
        "mode": "causal",
        "resumed": True,
        "return_state": True,
    },
    "sinks": {"sinks": 2, "mode": "cross"},
    "features of a part": {"configuration": EXACT, "part": "feature"},
    "exact pairs of a part": {"configuration": EXACT, "part": "exact", "mode": "causal"},
}


def arguments(
    name="positive",
    mode="bidirectional",
    *,
    part="whole",
    resumed=False,
    return_state=False,
    how=None,
    **options,
):
    """The operator's arguments for a small call; its tensors are leaves that want gradients."""
    sizes = {"heads": 4, "head_dim": 8, "value_dim": 5, "num_features": 10, **options}
    call = make_call(CASES[name], 12, mode, **sizes)
    state = None
    if resumed:
        _, state = call.run("native", return_state=True)
    if how is not None:
        call = call.with_inputs(*(how(x) for x in call.inputs))
    more = {} if mode != "causal" else {"state": state, "return_state": return_state}
    given = operator_arguments(call, part, **more)
    # The scale of the past is a constant to autograd.
    return [
        x.detach().requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "past_log_scale"
        else x
        for name, x in given._asdict().items()
    ]


# Calls whose operators are compiled, too: results that are wanted or not, and arguments that may
# be absent; test_compile.py has packed ones.
COMPILED = ("state to state", "features of a part")
# The dearest check, of autograd under the compiler.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def plain(given):
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in given]


@pytest.mark.parametrize(
    "name", [x if x in COMPILED else pytest.param(x, marks=pytest.mark.exhaustive) for x in CALLS]
)
def test_contract_under_the_compiler(name):
    """Of the forward pass; that it compiles takes the backward pass in."""
    checks = ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(favor_forward, arguments(**CALLS[name]), test_utils=checks)


@pytest.mark.parametrize("name", CALLS)
def test_contract(name):
    given = arguments(**CALLS[name])
    torch.library.opcheck(favor_forward, given, test_utils=CHECKS)
    given = plain(given)
    results = favor_forward(*given)
    random = generator(1)
    shown = [results[0], *results[3:5], results[5]]
    grads = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in shown]
    grads[1:3] = grads[1:3] if given[-1] else (None, None)
    grads[3] = None if CALLS[name].get("part") is None else grads[3]
    torch.library.opcheck(favor_backward, (*grads, *given, *results, False), test_utils=CHECKS)


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_left_alone_and_results_do_not_alias(name):
    given = arguments(**CALLS[name])
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    before = [x.detach().clone() for x in tensors]
    results = favor_forward(*given)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    filled = [x for x in results if x.numel()]
    storages = {x.untyped_storage().data_ptr() for x in (*tensors, *filled)}
    assert len(storages) == len({x.untyped_storage().data_ptr() for x in tensors}) + len(filled)


def poisoned(function, leaves, monkeypatch):
    """Results and gradients, with NaN wherever new memory is not written."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        results = function()
        total = sum(x.where(x.isfinite(), 0.0).sum() for x in results[::2] if x.requires_grad)
        return results, torch.autograd.grad(total, leaves, allow_unused=True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CALLS)
def test_every_result_is_written(name, monkeypatch):
    given = arguments(**CALLS[name])
    leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
    expected = favor_forward(*plain(given))
    results, gradients = poisoned(lambda: favor_forward(*given), leaves, monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(g is None or g.isfinite().all() for g in gradients)


def listed_arguments(rounds):
    """Of the operator for listed keys, for the last round."""
    call = make_call(POSITIVE, 24, configuration=CONFIGURATIONS[-1], num_features=16)
    call.options["listed_keys"].num_rounds = rounds
    given = trained(call).checked()
    *_, pairs = listed_pairs(given)
    tensors = (pairs.query, pairs.key, pairs.value, given.form.weight, given.form.bias)
    return (
        *(x.detach().requires_grad_() for x in tensors),
        *(pairs.row, pairs.position, pairs.begin, pairs.hidden),
        *(given.factor, 24, given.window),
    )


@pytest.mark.parametrize("rounds", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_contract_of_listed_keys(rounds, monkeypatch):
    given = listed_arguments(rounds)
    torch.library.opcheck(listed_forward, given)
    expected = listed_forward(*plain(given))
    grads = [torch.randn(x.shape, generator=generator(8), dtype=x.dtype) for x in expected]
    for trained_too in (False, True):
        arguments = (*grads, *plain(given), *expected, trained_too)
        torch.library.opcheck(listed_backward, arguments, test_utils=CHECKS)
    results, gradients = poisoned(lambda: listed_forward(*given), given[:5], monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("mode", SELF)
@pytest.mark.parametrize("length", [1, 5, 24, 33, 63, 70, 129])
def test_rows_beyond_the_last_are_not_read(length, mode):
    """Scratch memory holds what other calls left there: here, what is not a number."""
    call = make_call(POSITIVE, length, mode, heads=4, key_heads=2, num_features=8, window=4)
    call = trained(call).leaves()
    weight = torch.randn((*call.query.shape[:3], 8), generator=generator(length))

    def gradients(backend):
        junk = [torch.full((size,), torch.nan) for size in (100, 1000, 5000, 20000, 100000) * 9]
        del junk
        leaves = [*call.inputs, *call.feature_map.parameters()]
        return torch.autograd.grad(call.run(backend), leaves, weight)

    expected = gradients("torch")
    for _ in range(4):
        for ours, theirs in zip(gradients("native"), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_inputs_changed_before_the_backward_pass_are_an_error(name):
    call = make_call(POSITIVE, 20, "causal").leaves()
    call = call.with_inputs(*(x * 1 for x in call.inputs))
    out = call.run("native")
    getattr(call, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_outputs_lie_as_queries_do_and_gradients_as_inputs(key_heads, mode, dtype):
    """Transposed in, transposed out: the heads join to a view of (batch, length, heads * Dv)."""
    sizes = {"heads": 4, "key_heads": key_heads, "value_dim": 6, "dtype": dtype}
    call = make_call(POSITIVE, 30, mode, **sizes)
    assert call.run("native").is_contiguous()
    call = call.with_inputs(*(transposed(x).requires_grad_() for x in call.inputs))
    out = call.run("native").transpose(1, 2)
    assert out.is_contiguous()
    joined = out.flatten(2)
    assert joined.shape == (2, 30, 24)
    assert joined.data_ptr() == out.data_ptr()
    for x, gradient in zip(call.inputs, torch.autograd.grad(out.sum(), call.inputs), strict=True):
        assert gradient.stride() == x.stride()


def test_the_module_joins_its_heads_without_a_copy(monkeypatch):
    """The input of the projection after attention shares memory with the kernels' output."""
    attention = PerformerAttention(32, 4, batch_first=True)
    seen, made = [], []
    attention.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def recorded(*args):
        made.append(favor_forward(*args))
        return made[-1]

    monkeypatch.setattr("performers.attention.native.backend.favor_forward", recorded)
    with torch.no_grad():
        x = torch.randn(2, 20, 32, generator=generator(0))
        attention(x, x, x)
    assert seen[0].data_ptr() == made[0][0].data_ptr()


def test_key_masks_and_sums_of_any_stride():
    """Those that the kernels read in one piece are copied when they are not."""
    call = make_call(POSITIVE, 70, "causal", num_heads=2)
    _, state = call.run("native", return_state=True)
    call.options["key_mask"] = random_mask(2, 70)
    given = operator_arguments(call, state=state, return_state=True)
    strided = [
        x.repeat_interleave(2, dim=-1)[..., ::2] if isinstance(x, torch.Tensor) and i > 2 else x
        for i, x in enumerate(given)
    ]
    assert not strided[3].is_contiguous()
    for a, b in zip(favor_forward(*given), favor_forward(*strided), strict=True):
        assert torch.equal(a, b)


def test_a_trained_map_alone_wants_gradients():
    """Of weight and bias alone, to the bit those beside the gradients of the inputs."""
    call = make_call(POSITIVE, 130, "causal")
    call.feature_map = LearnedFeatures(SoftmaxFeatures(16, 24, generator=generator(0)))
    parameters = dict(call.feature_map.named_parameters())
    leaves = call.leaves()
    everything = torch.autograd.grad(
        leaves.run("native").sum(), [*leaves.inputs, *parameters.values()]
    )
    expected = dict(zip(parameters, everything[3:], strict=True))
    for name, parameter in parameters.items():
        call.feature_map.requires_grad_(False)
        parameter.requires_grad_()
        out = favor_attention(*call.inputs, call.feature_map, is_causal=True, backend="native")
        assert torch.equal(torch.autograd.grad(out.sum(), parameter)[0], expected[name])
