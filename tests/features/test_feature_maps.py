"""Feature maps as modules: defaults, generators, redrawing, saving, moving."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from performers import GeneralizedFeatures, PerformerAttention, SoftmaxFeatures, redraw_features_
from performers.features import CALIBRATED, ESTIMATORS, FUNCTIONS, PROJECTIONS
from tests.features.cases import CASES, GENERALIZED, SOFTMAX, TWO_SIDED, by_name, generator

DRAWN = [case for case in CASES if case.drawn]


@pytest.mark.parametrize(
    ("head_dim", "num_features"),
    [(1, 32), (8, 32), (16, 32), (24, 64), (32, 96), (64, 256), (80, 352), (128, 608), (256, 1408)],
)
def test_default_num_features(head_dim, num_features):
    assert abs(num_features - head_dim * math.log(head_dim)) <= 16 or num_features == 32
    for build in (SoftmaxFeatures, GeneralizedFeatures):
        assert build(head_dim).num_features == num_features
        assert build(head_dim)(torch.zeros(1, head_dim)).shape[-1] == num_features


def test_every_documented_choice_exists():
    assert {"positive", "hyperbolic", "trigonometric", *CALIBRATED} == set(ESTIMATORS)
    assert {"optimal", "sderf", "saderf", "data_aware"} == set(CALIBRATED)
    assert {"orthogonal", "gaussian", "simplex", "hadamard", "antithetic"} == set(PROJECTIONS)
    names = {"relu", "elu+1", "exp", "sigmoid", "gelu", "cos", "tanh", "abs", "identity"}
    assert names <= set(FUNCTIONS)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_softmax_choice_has_a_case(estimator, projection):
    """The battery must not miss an estimator that the package offers."""
    built = [case.build(4, 8) for case in SOFTMAX]
    found = any(m.estimator == estimator and m.projection == projection for m in built)
    assert found == (estimator not in TWO_SIDED or projection != "antithetic")


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_every_function_has_a_case(fn):
    built = [case.build(4, 8) for case in GENERALIZED]
    assert any(m.fn == fn for m in built)


def test_deterministic_maps_have_no_projection():
    feature_map = GeneralizedFeatures(7, fn="elu+1", projection=None)
    assert feature_map.num_features == 7
    assert feature_map.state_dict() == {}
    assert feature_map.redraw_() is feature_map
    assert redraw_features_(nn.ModuleList([feature_map])) == 1


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_projection_is_a_buffer_and_not_a_parameter(case):
    feature_map = case.build(8, 24, num_heads=3)
    assert list(feature_map.parameters()) == []
    fit = {"center", "transform", "query_transform", "key_transform", "log_volume"}
    assert set(feature_map.state_dict()) == {"weight", *(fit if case.calibrated else ())}
    assert feature_map.weight.shape[::2] == (3, 8)
    assert feature_map.weight.dtype == torch.get_default_dtype()
    assert case.build(8, 24).weight.shape[0] == 1


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_a_generator_decides_the_projection(case):
    first = case.build(8, 24, num_heads=2, generator=generator(0))
    torch.manual_seed(123)
    assert torch.equal(first.weight, case.build(8, 24, num_heads=2, generator=generator(0)).weight)
    other = case.build(8, 24, num_heads=2, generator=generator(1))
    assert not torch.equal(first.weight, other.weight)
    assert not torch.equal(first.weight[0], first.weight[1])


def test_a_generator_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    feature_map = SoftmaxFeatures(8, generator=generator(0))
    feature_map.redraw_(generator(1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_redraw_is_fresh_and_in_place(case):
    feature_map = case.build(8, 24, num_heads=2, generator=generator(0))
    buffer, before = feature_map.weight, feature_map.weight.clone()
    assert feature_map.redraw_(generator(5)) is feature_map
    assert feature_map.weight is buffer
    assert not torch.equal(buffer, before)
    assert torch.equal(buffer, case.build(8, 24, num_heads=2, generator=generator(5)).weight)


def test_redraw_keeps_dtype_and_row_lengths():
    feature_map = SoftmaxFeatures(16, 40, regularized=True, generator=generator(0)).bfloat16()
    feature_map.redraw_(generator(1))
    assert feature_map.weight.dtype == torch.float32
    norms = feature_map.weight.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 4.0), rtol=1e-6, atol=0)


def test_redraw_works_in_inference_mode_and_under_no_grad():
    feature_map = SoftmaxFeatures(8)
    before = feature_map.weight.clone()
    with torch.inference_mode():
        feature_map.redraw_()
    assert not torch.equal(feature_map.weight, before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_dict_round_trip_before_the_first_forward(case):
    saved = case.build(8, 24, generator=generator(0))
    stream = io.BytesIO()
    torch.save(saved.state_dict(), stream)
    stream.seek(0)
    loaded = case.build(8, 24, generator=generator(1))
    result = loaded.load_state_dict(torch.load(stream, weights_only=True))
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(2, 5, 8, generator=generator(2))
    assert torch.equal(loaded(x), saved(x))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_deepcopy_is_separate(case):
    feature_map = case.build(8, 24, generator=generator(0))
    copied = copy.deepcopy(feature_map)
    x = torch.randn(2, 5, 8, generator=generator(1))
    before = feature_map(x)
    assert torch.equal(copied(x), before)
    copied.redraw_(generator(2))
    assert torch.equal(feature_map(x), before)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(case, dtype):
    feature_map = case.build(8, 24, generator=generator(0)).to(dtype)
    for buffer in feature_map.buffers():
        # A rounded projection is no longer orthogonal: it stays in float32 at least.
        assert buffer.dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(5, 8, generator=generator(1)).to(dtype)
    estimate = feature_map.estimate_kernel(x, x)
    assert estimate.dtype == dtype
    expected = feature_map.double().estimate_kernel(x.double(), x.double())
    tolerance = 1e-12 if dtype == torch.float64 else 2**-8
    torch.testing.assert_close(
        estimate.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )


def test_default_dtype_and_device_are_respected():
    torch.set_default_dtype(torch.float64)
    try:
        assert SoftmaxFeatures(8).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert SoftmaxFeatures(8).weight.device.type == "meta"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_construction_on_meta_then_loading(case):
    saved = case.build(8, 24, generator=generator(0))
    with torch.device("meta"):
        feature_map = case.build(8, 24)
    feature_map.to_empty(device="cpu").load_state_dict(saved.state_dict())
    x = torch.randn(2, 5, 8, generator=generator(1))
    assert torch.equal(feature_map(x), saved(x))
    with torch.device("meta"):
        assigned = case.build(8, 24)
    assigned.load_state_dict(saved.state_dict(), assign=True)
    assert torch.equal(assigned(x), saved(x))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_calibration_changes_only_what_is_fitted(case):
    feature_map = case.build(8, 24, generator=generator(0))
    before = copy.deepcopy(feature_map.state_dict())
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    mask = torch.ones(2, 7, dtype=torch.bool)
    assert feature_map.calibrate_(query, key, key_mask=mask, scale=0.5) is feature_map
    changed = {
        name for name, x in feature_map.state_dict().items() if not torch.equal(before[name], x)
    }
    if case.calibrated and case.drawn:
        assert {"transform", "log_volume"} <= changed
        assert "weight" not in changed
    else:
        assert not changed


def test_replicas_take_the_original_projection():
    """What data parallelism does: copy the module, then send it the original's tensors."""
    module = nn.Sequential(PerformerAttention(16, 2, batch_first=True))
    replica = copy.deepcopy(module)
    redraw_features_(module, generator(0))
    replica.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 16, generator=generator(1))
    assert torch.equal(replica[0](x, x, x)[0], module[0](x, x, x)[0])


@pytest.mark.parametrize("case", [by_name("positive"), by_name("relu")], ids=str)
def test_printing_names_the_arguments(case):
    text = repr(case.build(8, 24, num_heads=2))
    for part in ("head_dim=8", "num_features=24", "num_heads=2", "orthogonal"):
        assert part in text
