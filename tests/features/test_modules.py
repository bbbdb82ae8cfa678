"""Feature maps as modules: choices, state, dtypes, devices, redrawing and resetting."""

import copy
import inspect
import io
import math
import pkgutil
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import performers
from performers import (
    GeneralizedFeatures,
    ListedKeys,
    PerformerAttention,
    SoftmaxFeatures,
    redraw_features_,
)
from performers.features import (
    CALIBRATED,
    ESTIMATORS,
    FUNCTIONS,
    PROJECTIONS,
    FeatureMap,
    FeatureRedrawer,
    LearnedFeatures,
    draw_projection,
)
from performers.features.recomputation import VersionedModule
from performers.nn import FavorAttention
from tests.features.cases import (
    CASES,
    GENERALIZED,
    REPRESENTATIVE,
    SOFTMAX,
    TWO_SIDED,
    generator,
    marked,
    normal,
)


def tensors(module):
    return dict((*module.named_parameters(), *module.named_buffers()))


def unequal(first, second):
    """Names of the tensors that differ."""
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize(
    ("head_dim", "num_features"),
    [(1, 32), (8, 32), (16, 32), (24, 64), (32, 96), (64, 256), (80, 352), (128, 608), (256, 1408)],
)
def test_default_num_features(head_dim, num_features):
    assert abs(num_features - head_dim * math.log(head_dim)) <= 16 or num_features == 32
    for build in (SoftmaxFeatures, GeneralizedFeatures):
        assert build(head_dim).num_features == num_features
        assert build(head_dim)(torch.zeros(1, head_dim)).shape[-1] == num_features


def test_every_choice_has_a_case():
    """The battery must not miss an estimator that the package offers."""
    assert {"positive", "hyperbolic", "trigonometric", *CALIBRATED} == set(ESTIMATORS)
    assert {"optimal", "sderf", "saderf", "data_aware"} == set(CALIBRATED)
    assert {"orthogonal", "gaussian", "simplex", "hadamard", "antithetic"} == set(PROJECTIONS)
    names = {"relu", "elu+1", "exp", "sigmoid", "gelu", "cos", "tanh", "abs", "identity"}
    assert names <= set(FUNCTIONS) <= {case.build(4, 8).fn for case in GENERALIZED}
    built = {(m.estimator, m.projection) for m in (case.build(4, 8) for case in SOFTMAX)}
    assert built == {
        (estimator, projection)
        for estimator in ESTIMATORS
        for projection in PROJECTIONS
        if not (estimator in TWO_SIDED and projection == "antithetic")
    }


@pytest.mark.parametrize("case", marked([x for x in CASES if x.drawn]), ids=str)
def test_the_projection_is_a_buffer_that_redraw_changes_in_place(case):
    feature_map = case.build(8, 24, num_heads=3, generator=generator(0))
    assert list(feature_map.parameters()) == []
    fit = {"center", "transform", "query_transform", "key_transform", "log_volume"}
    assert set(feature_map.state_dict()) == {"weight", *(fit if case.calibrated else ())}
    buffer, before = feature_map.weight, feature_map.weight.clone()
    options = {name: getattr(feature_map, name) for name in ("projection", "regularized")}
    options["generator"], rows = generator(0), buffer.shape[1]
    drawn = torch.stack([draw_projection(rows, 8, **options) for _ in range(3)])
    assert torch.equal(buffer, drawn.to(torch.get_default_dtype()))
    assert case.build(8, 24).weight.shape[0] == 1
    torch.manual_seed(123)
    assert torch.equal(case.build(8, 24, num_heads=3, generator=generator(0)).weight, before)
    assert not torch.equal(before[0], before[1])
    with torch.inference_mode():
        assert feature_map.redraw_(generator(5)) is feature_map
    assert feature_map.weight is buffer
    assert not torch.equal(buffer, before)
    assert torch.equal(buffer, case.build(8, 24, num_heads=3, generator=generator(5)).weight)


def test_deterministic_maps_have_no_projection():
    feature_map = GeneralizedFeatures(7, fn="elu+1", projection=None)
    assert feature_map.num_features == 7
    assert feature_map.state_dict() == {}
    assert feature_map.redraw_() is feature_map
    assert redraw_features_(nn.ModuleList([feature_map])) == 1


@pytest.mark.parametrize("case", marked(CASES), ids=str)
def test_saving_copying_and_loading(case):
    """From memory, from the meta device, and with ``assign``."""
    saved = case.build(8, 24, generator=generator(0))
    stream, x = io.BytesIO(), normal(2, 5, 8).float()
    torch.save(saved.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    loaded = case.build(8, 24, generator=generator(1))
    with torch.device("meta"):
        meta, assigned = case.build(8, 24), case.build(8, 24)
    assert all(tensor.is_meta for tensor in tensors(meta).values())
    assert meta.estimate_kernel(x.to("meta"), x.to("meta")).shape == (2, 5, 5)
    for feature_map, options in (
        (loaded, {}),
        (meta.to_empty(device="cpu"), {}),
        (assigned, {"assign": True}),
    ):
        feature_map.load_state_dict(state, **options)
        assert torch.equal(feature_map(x), saved(x))
    before = saved(x)
    copied = copy.deepcopy(saved)
    assert torch.equal(copied(x), before)
    copied.redraw_(generator(2))
    assert torch.equal(saved(x), before)


@pytest.mark.parametrize("case", marked(CASES), ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(case, dtype):
    feature_map = case.build(8, 24, generator=generator(0))
    before = tensors(copy.deepcopy(feature_map))
    feature_map.to(dtype)
    for name, tensor in tensors(feature_map).items():
        # A rounded projection is no longer orthogonal: it stays in float32 at least.
        assert tensor.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(tensor.float(), before[name])
    trained = {"weight", "bias"} if case.name == "learned" else set()
    assert set(dict(feature_map.named_parameters())) == trained
    x = normal(5, 8, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        estimate = feature_map.estimate_kernel(x, x)
    assert estimate.dtype == dtype
    expected = feature_map.double().estimate_kernel(x.double(), x.double())
    tolerance = 1e-12 if dtype == torch.float64 else 2**-8
    torch.testing.assert_close(
        estimate.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
    )
    if case.drawn:
        assert feature_map.to(dtype).redraw_().weight.dtype == torch.float64


def test_a_map_without_a_form_is_not_implemented():
    with pytest.raises(NotImplementedError):
        FeatureMap(4, 8, num_rows=8, projection="gaussian")(torch.zeros(2, 4))


def test_the_default_dtype_is_respected():
    torch.set_default_dtype(torch.float64)
    try:
        assert SoftmaxFeatures(8).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", marked(CASES), ids=str)
def test_calibration_changes_only_what_is_fitted(case):
    feature_map = case.build(8, 24, generator=generator(0))
    before = copy.deepcopy(feature_map.state_dict())
    query, key, mask = normal(2, 3, 5, 8), normal(2, 3, 7, 8), torch.ones(2, 7, dtype=torch.bool)
    assert feature_map.calibrate_(query, key, key_mask=mask, scale=0.5) is feature_map
    changed = unequal(before, feature_map.state_dict())
    if case.calibrated and case.drawn:
        assert {"transform", "log_volume"} <= changed
        assert "weight" not in changed
    else:
        assert not changed


def test_printing_names_the_arguments():
    for build in (SoftmaxFeatures, GeneralizedFeatures):
        text = repr(build(8, 24, num_heads=2))
        for part in ("head_dim=8", "num_features=24", "num_heads=2", "orthogonal"):
            assert part in text


def model(seed=0):
    """Three feature maps, one inside attention, and a linear layer."""
    torch.manual_seed(seed)
    maps = [SoftmaxFeatures(8), SoftmaxFeatures(8)]
    return nn.ModuleList([*maps, nn.Linear(4, 4), nn.Sequential(PerformerAttention(16, 2))])


def weights(module):
    return {
        name: x.weight.clone() for name, x in module.named_modules() if isinstance(x, FeatureMap)
    }


def test_redraw_features_reaches_every_map_and_nothing_else():
    module, other = model(), model(1)
    before = copy.deepcopy(module.state_dict())
    for x in (module, other):
        random = torch.get_rng_state()
        assert redraw_features_(x, generator(7)) == 3
        assert torch.equal(torch.get_rng_state(), random)
    changed = {"0.weight", "1.weight", "3.0.feature_map.weight"}
    assert unequal(before, module.state_dict()) == changed
    assert not unequal(weights(module), weights(other))
    assert not torch.equal(module[0].weight, module[1].weight)
    for x in (module, other):
        torch.manual_seed(7)
        redraw_features_(x)
    assert not unequal(weights(module), weights(other))


def test_redraws_are_due_by_step_count_in_training():
    module = model()
    redrawer, history = FeatureRedrawer(module, 3, seed=1), []
    for step in range(1, 14):
        module.train(step <= 10)
        before, random = weights(module), torch.get_rng_state()
        history.append(redrawer.step())
        assert len(unequal(before, weights(module))) == 3 * history[-1]
        assert torch.equal(torch.get_rng_state(), random)
    assert history == [False, False, True] * 3 + 4 * [False]
    assert redrawer.steps == 13
    assert not any(FeatureRedrawer(module.train(), 0).step() for _ in range(20))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_redraws_are_a_function_of_seed_and_step(seed):
    """Whatever the process, its data, its randomness, its start; the caller's count is used."""
    straight, resumed, counted, other = (model(i) for i in range(4))
    redrawer = FeatureRedrawer(straight, 4, seed=seed)
    for step in range(1, 9):
        redrawer.step()
        if step == 6:
            fresh = FeatureRedrawer(resumed, 4, seed=seed)
            fresh.load_state_dict(copy.deepcopy(redrawer.state_dict()))
        if step == 4:
            first = weights(straight)
    assert [fresh.step() for _ in range(2)] == [False, True]
    assert FeatureRedrawer(counted, 4, seed=seed).step(8)
    assert FeatureRedrawer(other, 4, seed=seed + 1).step(8)
    for module, differ in ((resumed, 0), (counted, 0), (other, 3)):
        assert len(unequal(weights(straight), weights(module))) == differ
    assert len(unequal(first, weights(straight))) == 3


def test_forward_draws_nothing(monkeypatch):
    """Neither a forward nor a backward pass may factorise a matrix or consume randomness."""
    module, x = PerformerAttention(16, 2, batch_first=True), normal(2, 9, 16).float()

    def refuse(*args, **kwargs):
        raise AssertionError("a forward pass drew a projection")

    monkeypatch.setattr(torch.linalg, "qr", refuse)
    before = torch.get_rng_state()
    for training in (True, False):
        module.train(training)
        for is_causal in (True, False):
            module(x, x, x, is_causal=is_causal)[0].sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(AssertionError):
        redraw_features_(module)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
def test_averaged_models_copy_the_projection(average):
    """An average that includes buffers shortens the rows, until it is redrawn."""
    module = PerformerAttention(32, 4)
    copied, averaged = (
        AveragedModel(module, multi_avg_fn=average, use_buffers=x) for x in (False, True)
    )
    for _ in range(20):
        redraw_features_(module)
        copied.update_parameters(module)
        averaged.update_parameters(module)
    assert not unequal(weights(copied.module), weights(module))
    weight = averaged.module.feature_map.weight
    assert weight.square().mean() < 0.5
    redraw_features_(averaged)
    assert weight.square().mean() == pytest.approx(1, abs=0.2)


RESET = {x.name: partial(x.build, 8, 16) for x in REPRESENTATIVE if x.drawn} | {
    "heads": lambda: SoftmaxFeatures(8, 16, estimator="data_aware", num_heads=2),
    "deterministic": lambda: GeneralizedFeatures(8, projection=None),
    "learned": lambda: LearnedFeatures(SoftmaxFeatures(8, 16, estimator="data_aware")),
    "learned-heads": lambda: LearnedFeatures(SoftmaxFeatures(8, 16), num_heads=2),
    "learned-learned": lambda: LearnedFeatures(
        LearnedFeatures(SoftmaxFeatures(8, 16, estimator="data_aware"))
    ),
    "listed_keys": lambda: ListedKeys(8, num_rounds=2, num_heads=2),
    "attention": lambda: PerformerAttention(16, 2),
    "attention-bias": lambda: PerformerAttention(16, 2, add_bias_kv=True, kdim=8),
    "attention-fitted": lambda: PerformerAttention(
        16, 2, bias=False, feature_map=SoftmaxFeatures(8, 16, estimator="optimal")
    ),
}


def test_every_module_is_reset():
    found = set()
    for package in (performers.features, performers.attention, performers.nn):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # Kernels are no modules, and their package may be missing.
            if not info.name.endswith("libperformers_native") and ".triton." not in info.name:
                members = inspect.getmembers(import_module(info.name), inspect.isclass)
                found |= {cls for _, cls in members if cls.__module__ == info.name}
    found = {x for x in found if issubclass(x, nn.Module)}
    # These have no tensors.
    found -= {VersionedModule, FeatureMap, FavorAttention}
    assert found == {type(build()) for build in RESET.values()}


@pytest.mark.parametrize("name", RESET)
@pytest.mark.parametrize("made_on", ["cpu", "meta"])
def test_reset_parameters(name, made_on):
    """The same randomness gives the same module, whatever it held before."""
    torch.manual_seed(5)
    fresh = RESET[name]()
    if isinstance(fresh, SoftmaxFeatures):
        fresh.reset_calibration_()
    with torch.device(made_on):
        module = RESET[name]()
    if made_on == "meta":
        module.to_empty(device="cpu")
    for x in tensors(module).values():
        x.detach().fill_(torch.nan)
    torch.manual_seed(5)
    module.reset_parameters()
    assert not unequal(tensors(module), tensors(fresh))


def test_samples_of_listed_keys_are_forgotten():
    first, second = normal(1, 1, 50, 4).float(), normal(1, 1, 50, 4, seed=1).float()
    listed_keys, other = ListedKeys(4, 4), ListedKeys(4, 4)
    saved = copy.deepcopy(listed_keys.state_dict())
    for forget in (listed_keys.reset_parameters, lambda: listed_keys.load_state_dict(saved)):
        listed_keys.calibrate_(first + 5)
        forget()
        listed_keys.calibrate_(second)
        assert torch.equal(listed_keys.centers, other.calibrate_(second).centers)
        other.reset_parameters()
