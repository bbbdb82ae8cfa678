"""Memory orders that models bring: read in place, and answered in kind."""

import pytest
import torch

from performers import PerformerAttention, favor_attention
from performers.attention.native.operators import favor_forward
from tests.attention.cases import make_call, random_mask
from tests.attention.native.support import NATIVE, operator_arguments
from tests.features.cases import by_name, generator

pytestmark = NATIVE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def transposed(query, key, value):
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]


def fused(query, key, value):
    """Slices of one tensor (batch, length, heads, 3, head_dim), as a joint projection gives."""
    joint = torch.stack((query, key, value), dim=3).transpose(1, 2).contiguous()
    return [joint[..., i, :].transpose(1, 2) for i in range(3)]


def fused_outermost(query, key, value):
    return list(torch.stack((query, key, value)).contiguous())


def every_other_column(query, key, value):
    return [x.repeat_interleave(2, dim=-1)[..., ::2] for x in (query, key, value)]


def every_third_row(query, key, value):
    return [x.repeat_interleave(3, dim=-2)[..., ::3, :] for x in (query, key, value)]


def columns_outermost(query, key, value):
    return [x.mT.contiguous().mT for x in (query, key, value)]


def length_outermost(query, key, value):
    """(length, batch, heads, head_dim), as recurrent code keeps it."""
    return [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (query, key, value)]


ORDERS = (
    transposed,
    fused,
    fused_outermost,
    every_other_column,
    every_third_row,
    columns_outermost,
    length_outermost,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_the_order_of_memory_changes_no_bit(mode, order, dtype):
    call = make_call(by_name("positive"), 70, mode, head_dim=16, value_dim=16, dtype=dtype)
    call.options["key_mask"] = random_mask(2, 70)
    plain = call.leaves()
    views = [x.detach().requires_grad_() for x in order(*call.inputs)]
    assert any(not x.is_contiguous() for x in views) or order is fused_outermost
    expected = plain.run("native")
    out = favor_attention(*views, call.feature_map, backend="native", **call.options)
    assert torch.equal(out, expected)
    weight = torch.randn(out.shape, generator=generator(0)).to(dtype)
    # The gradient comes in another order still.
    got = torch.autograd.grad(out, views, weight.mT.contiguous().mT)
    wanted = torch.autograd.grad(expected, plain.inputs, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("mode", ["bidirectional", "causal", "cross"])
def test_strides_of_zero(mode):
    """Keys and values that are one head, one batch or one row, expanded; and out.sum()."""
    call = make_call(by_name("positive"), 70, mode, batch=1, heads=1)
    for shape in ((3, 2, -1, -1), (1, 4, -1, -1), (2, 1, -1, -1)):
        small = call.leaves()
        query, key, value = (x.expand(shape) for x in small.inputs)
        real = [x.detach().contiguous().requires_grad_() for x in (query, key, value)]
        options = {**call.options, "backend": "native"}
        out = favor_attention(query, key, value, call.feature_map, **options)
        expected = favor_attention(*real, call.feature_map, **options)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
        for x, y in zip(small.inputs, real, strict=True):
            torch.testing.assert_close(x.grad, y.grad.sum((0, 1), keepdim=True))
    row = call.key[..., :1, :].expand_as(call.key)
    repeated = favor_attention(
        call.query, row, call.value, call.feature_map, backend="native", **call.options
    )
    contiguous = favor_attention(
        call.query, row.clone(), call.value, call.feature_map, backend="native", **call.options
    )
    assert torch.equal(repeated, contiguous)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_outputs_lie_as_queries_do(key_heads, mode, dtype):
    """Transposed in, transposed out: the heads join to a view of (batch, length, heads * Dv)."""
    call = make_call(
        by_name("positive"), 30, mode, heads=4, key_heads=key_heads, value_dim=6, dtype=dtype
    )
    assert call.run("native").is_contiguous()
    call.query, call.key, call.value = transposed(*call.inputs)
    out = call.run("native").transpose(1, 2)
    assert out.is_contiguous()
    joined = out.flatten(2)
    assert joined.shape == (2, 30, 24)
    assert joined.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_gradients_lie_as_inputs_do(mode):
    call = make_call(by_name("positive"), 30, mode, heads=4, key_heads=2)
    leaves = [x.detach().requires_grad_() for x in transposed(*call.inputs)]
    out = favor_attention(*leaves, call.feature_map, backend="native", **call.options)
    for x, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.stride() == x.stride()


def test_the_module_joins_its_heads_without_a_copy(monkeypatch):
    """What the projection after attention gets shares memory with the kernels' output."""
    attention = PerformerAttention(32, 4, batch_first=True)
    seen = []
    handle = attention.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made = []

    def recorded(*args):
        made.append(favor_forward(*args))
        return made[-1]

    monkeypatch.setattr("performers.attention.native.backend.favor_forward", recorded)
    with torch.no_grad():
        x = torch.randn(2, 20, 32, generator=generator(0))
        attention(x, x, x)
    handle.remove()
    assert seen[0].data_ptr() == made[0][0].data_ptr()


def test_key_masks_and_sums_of_any_stride():
    """Those that the kernels read in one piece are copied when they are not."""
    call = make_call(by_name("positive"), 70, "causal", num_heads=2)
    _, state = call.run("native", return_state=True)
    call.options["key_mask"] = random_mask(2, 70)
    plain = operator_arguments(call, state, return_state=True)
    strided = [
        x.repeat_interleave(2, dim=-1)[..., ::2] if isinstance(x, torch.Tensor) and i > 2 else x
        for i, x in enumerate(plain)
    ]
    assert not strided[3].is_contiguous()
    for a, b in zip(favor_forward(*plain), favor_forward(*strided), strict=True):
        assert torch.equal(a, b)
