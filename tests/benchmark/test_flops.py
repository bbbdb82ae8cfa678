"""Operations, against counts made product by product."""

import pytest

from performers.benchmark.contestants import contestants
from performers.benchmark.flops import exact_forward, favor_forward, of_pass
from performers.benchmark.workload import Workload


def product(rows, inner, columns):
    return 2 * rows * inner * columns


def test_linear_attention_is_four_products():
    length, features, head, value = 100, 32, 8, 12
    by_hand = (
        2 * product(length, head, features)
        + product(features, length, value)
        + product(length, features, value)
    )
    count = favor_forward(length=length, num_features=features, head_dim=head, value_dim=value)
    assert count == by_hand


def test_with_square_heads_it_is_8_l_m_d_for_each_head_and_sequence():
    count = favor_forward(length=4096, num_features=256, head_dim=64, heads=8, batch=3)
    assert count == 3 * 8 * 8 * 4096 * 256 * 64


@pytest.mark.parametrize(("length", "chunk"), [(1000, 64), (40, 40)])
def test_causal_blocks_add_half_a_square_a_token(length, chunk):
    shape = {"length": length, "num_features": 256, "head_dim": 64, "heads": 2}
    added = favor_forward(**shape, is_causal=True) - favor_forward(**shape)
    squares = product(chunk, 256, chunk) + product(chunk, chunk, 64)
    assert added == 2 * length / chunk * squares / 2


def test_exact_attention_is_two_squares_and_causal_half_of_them():
    shape = {"length": 512, "head_dim": 64, "heads": 8, "batch": 2}
    assert exact_forward(**shape) == 2 * 8 * 2 * product(512, 64, 512) == 2 * 8 * 4 * 512**2 * 64
    assert 2 * exact_forward(**shape, is_causal=True) == exact_forward(**shape)
    assert exact_forward(length=10, head_dim=4, value_dim=6) == 2 * 100 * 10


def test_a_backward_pass_is_two_forward_passes():
    assert of_pass(10, "forward") == 10
    assert of_pass(10, "forward+backward") == 30


def test_at_512_tokens_linear_and_exact_attention_do_the_same_work():
    workload = Workload()
    known = contestants()
    counts = {
        name: known[name].forward_flops(workload, 512, False)
        for name in ("performers torch", "SDPA", "performer-pytorch")
    }
    assert len(set(counts.values())) == 1
    halved = known["fast-transformers"].forward_flops(workload, 512, False)
    assert halved == counts["SDPA"] * 3 // 4
    assert known["identity"].forward_flops is None
