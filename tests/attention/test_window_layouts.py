"""Windows and sinks with every layout, dtype and packing that a caller may bring."""

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import (
    BACKENDS,
    FEW_EXACT,
    TESTED,
    WIDE,
    check_against_oracle,
    covered,
    make_call,
    random_mask,
)
from tests.features.cases import by_name

MODES = ("bidirectional", "causal")
PACKINGS = {
    "one": [0, 140],
    "empty": [0, 0, 1, 1, 1, 64, 65, 65, 140, 140],
    "singles": list(range(141)),
    "boundary": [0, 63, 64, 128, 129, 140],
    "short": [0, 3, 5, 9, 70, 72, 140],
}


def check_values(call, backend, tolerance=2e-5):
    check_against_oracle(call, backend, value_tolerance=tolerance, gradients=False)


@pytest.mark.parametrize("num_heads", [None, 2, 6])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads(backend, mode, num_heads):
    for case in covered(FEW_EXACT, backend):
        call = make_call(
            case,
            100,
            mode,
            heads=6,
            key_heads=2,
            num_heads=num_heads,
            seed=1,
            window=11,
            sinks=2,
        )
        check_values(call, backend)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (16, 1), (5, 33), (24, 24)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_and_value_dimensions(backend, mode, head_dim, value_dim):
    call = make_call(
        by_name("positive"), 90, mode, head_dim=head_dim, value_dim=value_dim, window=4, sinks=2
    )
    check_values(call, backend)


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, mode, how):
    call = make_call(by_name("positive"), 130, mode, seed=3, window=6, sinks=2)
    if how == "expanded":
        call.query, call.key, call.value = (x[:1, :1].expand(2, 2, -1, -1) for x in call.inputs)
        strided = call.inputs
    elif how == "transposed":
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in call.inputs]
    else:
        strided = [torch.stack((x, x * torch.nan), dim=-1)[..., 0] for x in call.inputs]
    out = favor_attention(*strided, call.feature_map, backend=backend, **call.options)
    whole = [x.contiguous() for x in call.inputs]
    expected = favor_attention(*whole, call.feature_map, backend=backend, **call.options)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    check_values(call, backend)


@pytest.mark.parametrize(
    ("batch", "length", "size", "options"),
    [
        (0, 5, 5, {"window": 2, "sinks": 1}),
        (2, 0, 0, {"window": 2, "sinks": 1}),
        (2, 0, 0, {"window": 2, "sinks": 1, "is_causal": True}),
        (2, 0, 4, {"sinks": 1}),
        (2, 4, 0, {"sinks": 1}),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", WIDE)
def test_empty_inputs(backend, masked, batch, length, size, options):
    """Nothing asked gives nothing; nothing to attend to gives zeros, with gradients of zero."""
    call = make_call(by_name("positive"), length, "cross", size=size, batch=batch, **options)
    call = call.leaves()
    if masked:
        call.options["key_mask"] = torch.ones(batch, size, dtype=torch.bool)
    out = call.run(backend)
    assert out.shape == (batch, 2, length, 8)
    assert (out == 0).all()
    gradients = torch.autograd.grad(out.sum(), call.inputs, allow_unused=True)
    assert all(g is None or (g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_inputs(backend, mode, dtype):
    """Computed in float32: against the oracle on the rounded inputs, only the output rounds."""
    for case in covered(FEW_EXACT, backend):
        call = make_call(case, 100, mode, seed=4, window=9, sinks=2)
        call.query, call.key, call.value = (x.to(dtype) for x in call.inputs)
        out = call.run(backend)
        assert out.dtype == dtype
        expected, conditioning = call.expected()
        error = (out.double() - expected).abs() - torch.finfo(dtype).eps * expected.abs()
        assert (error <= 2e-5 * conditioning).all(), error.max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", WIDE)
def test_float64(backend, mode):
    for case in covered(FEW_EXACT, backend):
        call = make_call(case, 100, mode, dtype=torch.float64, seed=5, window=9, sinks=2)
        assert call.run(backend).dtype == torch.float64
        check_values(call, backend, 1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, mode):
    """The output takes autocast's dtype; no product inside loses precision to it."""
    call = make_call(by_name("positive"), 130, mode, seed=6, window=9, sinks=2).leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call.run(backend)
    assert torch.equal(out, call.run(backend).to(torch.bfloat16))
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in call.inputs)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend, mode, scale):
    for case in covered(FEW_EXACT, backend):
        call = make_call(case, 70, mode, input_scale=0.7, seed=7, scale=scale, window=9, sinks=2)
        check_values(call, backend, 1e-4 if scale > 1 else 2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_default_scale_is_that_of_the_head_dimension(backend, mode):
    call = make_call(by_name("positive"), 40, mode, head_dim=9, window=9, sinks=2)
    torch.testing.assert_close(call.run(backend), call.run(backend, scale=1 / 3))


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (4, 0), (None, 2), (4, 2), (70, 5)])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_packings(backend, mode, packing, window, sinks):
    """A window ends where its sequence does; each sequence has sinks of its own."""
    offsets = torch.tensor(PACKINGS[packing], dtype=torch.int32)
    for case in covered(FEW_EXACT, backend):
        call = make_call(
            case,
            140,
            mode,
            batch=1,
            heads=4,
            key_heads=2,
            cu_seqlens=offsets,
            window=window,
            sinks=sinks,
        )
        check_values(call, backend)
        call.options["key_mask"] = random_mask(1, 140, seed=8)
        call.options["key_mask"][0, 9:70] = False
        check_values(call, backend)


@pytest.mark.parametrize("mode", MODES)
def test_the_reference_packs_too(mode):
    call = make_call(by_name("positive"), 140, mode, batch=1, window=4, sinks=3)
    call.options["cu_seqlens"] = torch.tensor(PACKINGS["short"])
    call.options["key_mask"] = random_mask(1, 140, seed=9)
    check_values(call, "reference")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_one_at_a_time(backend, mode):
    lengths = [5, 0, 64, 1, 200, 63]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    call = make_call(by_name("positive"), sum(lengths), mode, batch=1, window=20, sinks=3, seed=2)
    parts = [
        favor_attention(*sequence, call.feature_map, backend=backend, **call.options)
        for sequence in zip(*(x.split(lengths, dim=-2) for x in call.inputs), strict=True)
    ]
    packed = call.run(backend, cu_seqlens=offsets)
    torch.testing.assert_close(packed, torch.cat(parts, dim=-2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_to_the_bit(backend, mode):
    results = []
    for _ in range(2):
        call = make_call(by_name("positive"), 150, mode, seed=6, window=9, sinks=2).leaves()
        out = call.run(backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), call.inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend, mode):
    call = make_call(by_name("positive"), 70, mode, window=5, sinks=2)
    call.options["key_mask"] = torch.arange(70).expand(2, -1) % 3 > 0
    kept = [x.clone() for x in (*call.inputs, call.options["key_mask"])]
    call.run(backend)
    now = (*call.inputs, call.options["key_mask"])
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


@pytest.mark.parametrize("is_causal", [False, True])
def test_meta_tensors_have_a_shape(is_causal):
    case = by_name("positive")
    with torch.device("meta"):
        query = torch.empty(2, 4, 100, 16)
        features = case.build(16, 32)
        out = favor_attention(query, query, query, features, is_causal=is_causal, window=5, sinks=2)
    assert out.shape == query.shape
