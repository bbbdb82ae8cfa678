"""The library's own models with exact attention, made linear: configuration, layers, saving."""

import pytest
import torch

from performers import SoftmaxFeatures
from performers.convert import load_performer, to_performer
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from tests.convert.models import (
    CLOSE,
    PERFORMERS,
    converted,
    favors,
    output,
    performer,
    seeded,
    token_ids,
)

FEW = {"num_features": 16, "window": 2, "sinks": 1}
GENERATION = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("kind", [PerformerForMaskedLM, PerformerForCausalLM])
def test_packed_sequences_of_a_hybrid(kind):
    packed = torch.arange(40).div(13, rounding_mode="floor").expand(2, -1)
    model, given = performer(kind), {"input_ids": token_ids(2, 40), "sequence_ids": packed}
    hybrid = converted(model, window=20, layers=[1])
    torch.testing.assert_close(output(hybrid, given), output(model, given), **CLOSE)


@pytest.mark.parametrize("name", PERFORMERS)
def test_the_configuration_says_what_the_model_has_become(name):
    model = performer(PERFORMERS[name])
    original = model.config
    to_performer(model, **FEW)
    config = model.config
    assert (config.attention, config.estimator) == ("favor-softmax", "positive")
    assert (config.num_features, config.window, config.sinks) == (16, 2, 1)
    assert config.exact_layers is None
    assert config.features_per_head
    # The same as one that is built from the configuration.
    for ours, built in zip(favors(model), favors(type(model)(config)), strict=True):
        assert str(ours) == str(built)
        assert ours.feature_map.num_heads == config.num_attention_heads
    # Models that were built from the original configuration keep theirs.
    assert original.attention == "exact"
    assert all(x.config is config for x in model.modules() if hasattr(x, "config"))


@pytest.mark.parametrize(
    ("layers", "exact"), [((1,), [0, 2]), ((0, 2), [1]), ((-1,), [0, 1]), ((0, 1, -1), None)]
)
def test_layers_that_are_left_out_stay_exact(layers, exact):
    model = performer(PerformerForCausalLM, num_hidden_layers=3).double()
    to_performer(model, **FEW, layers=layers)
    assert model.config.exact_layers == exact
    assert len(favors(model)) == 3 - len(exact or [])
    ids = token_ids(2, 9)
    cached = model.generate(ids, **GENERATION)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **GENERATION))


@pytest.mark.parametrize("name", PERFORMERS)
def test_a_saved_model_loads_with_equal_outputs(tmp_path, name):
    model, given = performer(PERFORMERS[name]), {"input_ids": token_ids(2, 20)}
    options = {**FEW, "estimator": "data_aware", "projection": "simplex", "layers": [1]}
    to_performer(model, **options, calibration=[token_ids(4, 20, seed=5)], generator=seeded())
    model.save_pretrained(tmp_path)
    loaded = load_performer(tmp_path)
    assert type(loaded) is type(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    # Matrix products round by where their matrices lie.
    torch.testing.assert_close(output(loaded, given), output(model, given), **CLOSE)
    assert loaded.config.exact_layers == [0]
    ((ours,), (theirs,)) = favors(model), favors(loaded)
    assert str(ours) == str(theirs)
    assert (theirs.feature_map.center != 0).any()


def test_a_fit_that_is_not_in_the_file_starts_as_none(tmp_path):
    """Memory that was never written would be taken for a fit."""
    performer().save_pretrained(tmp_path)
    changes = {"attention": "favor-softmax", "estimator": "data_aware", "num_features": 16}
    config = PerformerConfig.from_pretrained(tmp_path, **changes)
    fresh = SoftmaxFeatures(8, 16, estimator="data_aware")
    for favor in favors(PerformerForMaskedLM.from_pretrained(tmp_path, config=config)):
        for name in ("center", "transform", "query_transform", "key_transform", "log_volume"):
            assert torch.equal(getattr(favor.feature_map, name), getattr(fresh, name)), name
        assert (favor.feature_map.weight.norm(dim=-1) > 0.5).all()
