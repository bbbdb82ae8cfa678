"""From the meta device: after ``reset_parameters`` nothing is left as memory came."""

import copy
import inspect
import pkgutil
from importlib import import_module

import pytest
import torch
from torch import nn

import performers.attention
import performers.features
import performers.nn
from performers import GeneralizedFeatures, ListedKeys, PerformerAttention, SoftmaxFeatures
from performers.features import CALIBRATED, ESTIMATORS, PROJECTIONS, FeatureMap, LearnedFeatures
from performers.features.draws import Drawn
from performers.nn import FavorAttention
from tests.features.cases import CASES, generator

BUILDERS = {case.name: lambda case=case: case.build(8, 16) for case in CASES}
BUILDERS |= {
    "heads": lambda: SoftmaxFeatures(8, 16, estimator="data_aware", num_heads=2),
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


def modules():
    """Every module class of the three packages."""
    found = set()
    for package in (performers.features, performers.attention, performers.nn):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith("libperformers_native"):
                continue
            for _, cls in inspect.getmembers(import_module(info.name), inspect.isclass):
                if issubclass(cls, nn.Module) and cls.__module__.startswith(package.__name__):
                    found.add(cls)
    return found


def test_every_module_is_tested():
    built = {type(build()) for build in BUILDERS.values()}
    # FavorAttention has no tensors of its own.
    assert modules() - {Drawn, FeatureMap, FavorAttention} == built


def tensors(module):
    return {
        name: x
        for name, x in (*module.named_parameters(), *module.named_buffers())
        if x is not None
    }


@pytest.mark.parametrize("name", BUILDERS)
def test_from_the_meta_device(name):
    with torch.device("meta"):
        module = BUILDERS[name]()
    assert all(x.is_meta for x in tensors(module).values())
    module.to_empty(device="cpu")
    for x in tensors(module).values():
        x.detach().fill_(torch.nan)
    torch.manual_seed(5)
    module.reset_parameters()
    assert all(x.isfinite().all() for x in tensors(module).values())


UNFITTED = {name: build for name, build in BUILDERS.items() if "attention" in name}
UNFITTED |= {
    f"{estimator}-{projection}": lambda e=estimator, p=projection: SoftmaxFeatures(
        8, 16, estimator=e, projection=p
    )
    for estimator in ESTIMATORS
    for projection in PROJECTIONS
    if not (projection == "antithetic" and estimator in ("hyperbolic", "trigonometric"))
}
UNFITTED |= {
    "relu": lambda: GeneralizedFeatures(8, 16),
    "deterministic": lambda: GeneralizedFeatures(8, projection=None),
    "listed_keys": BUILDERS["listed_keys"],
    "learned": lambda: LearnedFeatures(SoftmaxFeatures(8, 16, estimator="data_aware")),
    "learned-heads": BUILDERS["learned-heads"],
    "learned-learned": BUILDERS["learned-learned"],
}


@pytest.mark.parametrize("name", UNFITTED)
def test_as_freshly_built(name):
    """The same randomness gives the same module, whatever it held before."""
    torch.manual_seed(5)
    fresh = UNFITTED[name]()
    torch.manual_seed(6)
    module = UNFITTED[name]()
    for x in tensors(module).values():
        x.detach().fill_(torch.nan)
    torch.manual_seed(5)
    module.reset_parameters()
    expected = tensors(fresh)
    for tensor, x in tensors(module).items():
        assert torch.equal(x, expected[tensor]), tensor


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_a_fit_is_forgotten(estimator):
    features = SoftmaxFeatures(4, 8, estimator=estimator)
    query, key = (torch.randn(1, 2, 30, 4, generator=generator(i)) for i in range(2))
    features.calibrate_(3 * query, key)
    features.reset_parameters()
    once = copy.deepcopy(features).calibrate_(query, key)
    fresh = SoftmaxFeatures(4, 8, estimator=estimator).calibrate_(query, key)
    for name in ("center", "transform", "query_transform", "key_transform", "log_volume"):
        assert torch.equal(getattr(once, name), getattr(fresh, name))


def test_samples_of_buckets_are_forgotten():
    first, second = (torch.randn(1, 1, 50, 4, generator=generator(i)) for i in range(2))
    listed_keys, other = ListedKeys(4, 4), ListedKeys(4, 4)
    saved = copy.deepcopy(listed_keys.state_dict())
    for forget in (listed_keys.reset_parameters, lambda: listed_keys.load_state_dict(saved)):
        listed_keys.calibrate_(first + 5)
        forget()
        listed_keys.calibrate_(second)
        assert torch.equal(listed_keys.centers, other.calibrate_(second).centers)
        other.reset_parameters()


def test_learned_features_keep_no_second_copy():
    learned = LearnedFeatures(SoftmaxFeatures(8, 16))
    assert all(x.is_meta for x in tensors(learned._source[0]).values())
    assert set(learned.state_dict()) == {"weight", "bias"}
