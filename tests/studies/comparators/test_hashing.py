"""The hash of Reformer: buckets by angle."""

import math

import pytest
import torch

from performers import redraw_features_
from performers.features import FeatureMap
from performers.models import PerformerForMaskedLM
from studies.comparators import HashFeatures
from tests.models.cases import tokens
from tests.studies.comparators.oracle import make_config


def points(count, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 1, count, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("buckets", [1, 2, 6, 64, 128, 256])
def test_buckets_are_in_range_and_about_even(buckets):
    torch.manual_seed(0)
    features = HashFeatures(16, buckets, 3)
    found = features.hash(points(4000))
    assert found.shape == (1, 1, 3, 4000)
    assert found.min() >= 0
    assert found.max() < buckets
    for bucket in found[0, 0]:
        counts = torch.bincount(bucket, minlength=buckets).double()
        assert counts.max() < 4 * 4000 / buckets + 20
        assert (counts > 0).double().mean() > 0.85


def test_the_definition():
    torch.manual_seed(0)
    features = HashFeatures(16, 6, 2)
    assert features.weight.shape == (1, 6, 16)
    x = points(50)
    for number, bucket in enumerate(features.hash(x)[0, 0]):
        rotated = x[0, 0] @ features.weight[0, 3 * number : 3 * number + 3].double().T
        assert torch.equal(bucket, torch.cat((rotated, -rotated), dim=-1).argmax(-1))


def test_many_buckets_are_pairs():
    """Of as many as come nearest to the root, so that hashing is cheap."""
    torch.manual_seed(0)
    for buckets, factors in ((128, (128,)), (256, (16, 16)), (144, (12, 12)), (132, (6, 22))):
        features = HashFeatures(8, buckets, 2)
        assert features.factors == factors
        assert features.weight.shape[1] == sum(factors)
    features = HashFeatures(8, 256, 1)
    x = points(100, 8)
    weight = features.weight[0].double()
    first, second = ((x[0, 0] @ part.T) for part in weight.split(8))
    pair = [torch.cat((part, -part), dim=-1).argmax(-1) for part in (first, second)]
    assert torch.equal(features.hash(x)[0, 0, 0], 16 * pair[0] + pair[1])


def test_scale_does_not_matter_and_opposites_never_meet():
    torch.manual_seed(0)
    features = HashFeatures(16, 8, 50)
    x = points(30)
    assert torch.equal(features.hash(x), features.hash(1e3 * x))
    assert (features.hash(x) != features.hash(-x)).all()


def test_the_kernel_falls_with_the_angle():
    torch.manual_seed(0)
    features = HashFeatures(16, 4, 2000)
    x = points(1)[0, 0, 0]
    x = x / x.norm()
    y = points(1, seed=1)[0, 0, 0]
    y = y - (y @ x) * x
    y = y / y.norm()
    angles = torch.linspace(0, math.pi, 7, dtype=torch.float64)
    row = torch.stack([angle.cos() * x + angle.sin() * y for angle in angles])[None, None]
    shares = features.estimate_kernel(row[:, :, :1], row)[0, 0, 0]
    assert shares[0] == pytest.approx(1)
    assert (shares[:-1] - shares[1:] > 0.02).all()
    assert shares[-1] == 0
    # At a right angle with two rows: both projections are independent, all buckets alike.
    assert shares[3] == pytest.approx(0.25, abs=0.04)
    phi = features(row)
    assert phi.shape == (1, 1, 7, 8000)
    torch.testing.assert_close(phi.square().sum(-1), torch.ones_like(phi[..., 0]))


def test_heads_of_their_own():
    torch.manual_seed(0)
    features = HashFeatures(16, 8, 2, num_heads=3)
    assert features.weight.shape == (3, 8, 16)
    x = points(200).expand(1, 3, -1, -1)
    found = features.hash(x)
    assert (found[:, 0] != found[:, 1]).any()
    shared = HashFeatures(16, 8, 2).hash(x)
    assert torch.equal(shared[:, 0], shared[:, 1])


def test_there_is_no_form():
    with pytest.raises(TypeError, match="no form"):
        HashFeatures(16, 8, 2).form()


def test_hashes_are_redrawn_with_the_features_and_stay_in_full_precision():
    torch.manual_seed(0)
    model = PerformerForMaskedLM(make_config("lsh")).eval()
    ids = tokens(2, 40)
    before = model(ids).logits
    assert torch.equal(before, model(ids).logits)
    maps = [module for module in model.modules() if isinstance(module, FeatureMap)]
    assert redraw_features_(model, torch.Generator().manual_seed(5)) == len(maps) == 2
    assert not torch.equal(maps[0].weight, maps[1].weight)
    after = model(ids).logits
    assert not torch.equal(before, after)
    redraw_features_(model, torch.Generator().manual_seed(5))
    assert torch.equal(after, model(ids).logits)
    model.to(torch.bfloat16)
    assert maps[0].weight.dtype == torch.float32
    assert torch.isfinite(model(ids).logits).all()
