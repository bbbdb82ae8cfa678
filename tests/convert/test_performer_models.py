"""The library's own models with exact attention, made linear in place."""

import copy

import pytest
import torch

from performers import SoftmaxFeatures, redraw_features_
from performers.convert.families.performer_models import PerformerModels
from performers.convert.options import Conversion
from performers.convert.to_performer import convert as convert_family
from performers.models import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerModel,
)
from performers.models.attention import ExactMechanism, FavorMechanism, build_mechanism
from performers.models.positions import rotary_angles, rotate
from tests.features.cases import generator
from tests.models.cases import (
    causal_model,
    left_padded,
    make_config,
    masked_model,
    right_padded,
    tokens,
)

KINDS = (
    PerformerModel,
    PerformerForMaskedLM,
    PerformerForCausalLM,
    PerformerForSequenceClassification,
)
LENGTH = 20
EXACT = Conversion(num_features=8, window=LENGTH)
FEW = Conversion(num_features=16, window=2, sinks=1)
FITTED = Conversion(num_features=16, window=2, sinks=1, estimator="data_aware")
CLOSE = {"rtol": 0, "atol": 1e-4}


def build(kind=PerformerForMaskedLM, *, seed=0, **options):
    torch.manual_seed(seed)
    return kind(make_config("exact", **options)).eval()


def convert(model, settings=EXACT, calibration=None, seed=0):
    return convert_family(PerformerModels(model, settings), calibration, generator(seed))


def both(model, settings=EXACT):
    converted = copy.deepcopy(model)
    convert(converted, settings)
    return model, converted


def outputs(model, ids=None, **options):
    out = model(tokens(2, LENGTH) if ids is None else ids, **options)
    return out.last_hidden_state if isinstance(model, PerformerModel) else out.logits


def mechanisms(model):
    return [x for x in model.modules() if isinstance(x, (ExactMechanism, FavorMechanism))]


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_over_everything_reproduces_the_model(kind, positions):
    exact, ours = both(build(kind, position_embedding=positions))
    assert [type(x) for x in mechanisms(ours)] == [FavorMechanism] * 2
    torch.testing.assert_close(outputs(ours), outputs(exact), **CLOSE)


@pytest.mark.parametrize("padded", [left_padded, right_padded])
@pytest.mark.parametrize("kind", [PerformerForMaskedLM, PerformerForCausalLM])
def test_padding(kind, padded):
    exact, ours = both(build(kind))
    ids, mask = padded([tokens(1, size, seed=size)[0] for size in (LENGTH, 11, 3)])
    real = mask.bool()
    torch.testing.assert_close(
        outputs(ours, ids, attention_mask=mask)[real],
        outputs(exact, ids, attention_mask=mask)[real],
        **CLOSE,
    )


@pytest.mark.parametrize("kind", [PerformerForMaskedLM, PerformerForCausalLM])
def test_packed_sequences(kind):
    exact, ours = both(build(kind), Conversion(num_features=8, window=LENGTH, layers=(1,)))
    ids = tokens(2, 2 * LENGTH)
    packed = torch.arange(2 * LENGTH).div(13, rounding_mode="floor").expand(2, -1)
    torch.testing.assert_close(
        outputs(ours, ids, sequence_ids=packed), outputs(exact, ids, sequence_ids=packed), **CLOSE
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_says_what_the_model_has_become(kind):
    model = build(kind)
    original = model.config
    names = convert(model, FEW)
    prefix = "" if kind is PerformerModel else "performer."
    assert names == [f"{prefix}layers.{i}.attention" for i in range(2)]
    config = model.config
    assert (config.attention, config.num_features, config.estimator) == (
        "favor-softmax",
        16,
        "positive",
    )
    assert (config.window, config.sinks, config.exact_layers) == (2, 1, None)
    assert config.features_per_head
    for name in names:
        mechanism = model.get_submodule(name).mechanism
        assert mechanism.feature_map.num_heads == config.num_attention_heads
        assert str(mechanism) == str(build_mechanism(config))
        assert (mechanism.window, mechanism.sinks) == (2, 1)
    # Models that were built from the same configuration keep theirs.
    assert original.attention == "exact"
    assert all(x.config is config for x in model.modules() if hasattr(x, "config"))


def test_weights_stay_and_so_do_mode_and_dtype():
    for dtype in (torch.float64, torch.bfloat16):
        model = build().to(dtype).train()
        model.performer.layers[1].eval()
        before = dict(model.named_parameters())
        values = {name: p.detach().clone() for name, p in before.items()}
        convert(model)
        for name, parameter in model.named_parameters():
            assert parameter is before[name]
            assert torch.equal(parameter, values[name])
        assert [x.training for x in mechanisms(model)] == [True, False]
        features = mechanisms(model)[0].feature_map
        assert features.weight.dtype == torch.promote_types(dtype, torch.float32)
        assert outputs(model).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_with_equal_outputs(tmp_path, kind):
    settings = Conversion(
        num_features=16,
        window=2,
        sinks=1,
        estimator="data_aware",
        projection="simplex",
        layers=(1,),
    )
    model = build(kind)
    convert(model, settings, [tokens(4, LENGTH, seed=5)])
    model.save_pretrained(tmp_path)
    torch.manual_seed(77)
    loaded = kind.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.config.exact_layers == [0]
    features = mechanisms(loaded)[1].feature_map
    assert (features.estimator, features.projection) == ("data_aware", "simplex")
    assert (features.center != 0).any()
    for name, tensor in mechanisms(model)[1].feature_map.named_buffers():
        assert torch.equal(getattr(features, name), tensor)


def test_a_fit_that_is_not_in_the_file_starts_as_none(tmp_path):
    """Memory that was never written would be taken for a fit."""
    build().save_pretrained(tmp_path)
    config = make_config("favor-softmax", estimator="data_aware", num_features=16)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path, config=config)
    for mechanism in mechanisms(loaded):
        features = mechanism.feature_map
        fresh = SoftmaxFeatures(16, 16, estimator="data_aware")
        for name in ("center", "transform", "query_transform", "key_transform", "log_volume"):
            assert torch.equal(getattr(features, name), getattr(fresh, name)), name
        assert features.weight.isfinite().all()
        assert (features.weight.norm(dim=-1) > 0.5).all()


def test_features_are_drawn_from_the_generator():
    drawn = []
    for seed in (1, 1, 2):
        model = build()
        state = torch.get_rng_state()
        convert(model, FEW, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append([x.feature_map.weight for x in mechanisms(model)])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_redrawing_keeps_the_fit_and_training_goes_on():
    model = build()
    convert(model, FITTED, [tokens(4, LENGTH)])
    features = mechanisms(model)[0].feature_map
    center, weight, before = features.center.clone(), features.weight.clone(), outputs(model)
    assert redraw_features_(model, generator(9)) == 2
    assert torch.equal(features.center, center)
    assert not torch.equal(features.weight, weight)
    assert (outputs(model) - before).abs().max() > 1e-5
    model.train()
    model(tokens(2, LENGTH), labels=tokens(2, LENGTH)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("layers", "exact"), [((1,), [0, 2]), ((0, 2), [1]), ((-1,), [0, 1]), ((0, 1, -1), None)]
)
def test_layers_that_are_left_out_stay_exact(layers, exact):
    model = causal_model("exact", num_hidden_layers=3, tie_word_embeddings=False, seed=3)
    settings = Conversion(num_features=16, window=2, sinks=1, layers=layers)
    names = convert(model, settings)
    assert model.config.exact_layers == exact
    kept = exact or []
    assert names == [f"performer.layers.{i}.attention" for i in range(3) if i not in kept]
    kinds = [ExactMechanism if i in kept else FavorMechanism for i in range(3)]
    assert [type(x) for x in mechanisms(model)] == kinds
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(tokens(2, 9), **options)
    assert torch.equal(generated, model.generate(tokens(2, 9), use_cache=False, **options))


def projections(model, ids):
    """Queries and keys of the last layer of an exact model, after rotation."""
    inner = model.performer
    hidden = inner(ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
    block = inner.layers[-1]
    attention = block.attention
    projected = attention.query_key_value(block.attention_norm(hidden))
    query, key = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)[:2]
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    angles = rotary_angles(positions, model.config.head_dim, model.config.rope_theta)
    return rotate(query, angles), rotate(key, angles)


def assert_fitted_alike(found, expected):
    for name, tensor in expected.named_buffers():
        if name != "weight":
            torch.testing.assert_close(getattr(found, name), tensor, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_features_are_fitted_to_rotated_queries_and_keys(kind):
    exact = masked_model("exact") if kind == "masked" else causal_model("exact")
    batches = [tokens(3, LENGTH, seed=1), tokens(1, 30, seed=2)]
    model = copy.deepcopy(exact).train()
    model.performer.layers[0].eval()
    inputs = ({"input_ids": batches[0], "labels": batches[0]}, (batches[1],))
    convert(model, FITTED, iter(inputs))
    assert model.training
    assert not model.performer.layers[0].training
    expected = SoftmaxFeatures(16, 16, estimator="data_aware", num_heads=2).double()
    for ids in batches:
        expected.calibrate_(*projections(exact, ids), is_causal=kind == "causal", window=2, sinks=1)
    assert_fitted_alike(mechanisms(model)[-1].feature_map, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_padding_and_packing_do_not_change_the_fit(kind):
    """Each sequence alone, padded, or packed with others: the same pairs."""
    build_one = masked_model if kind == "masked" else causal_model
    rows = [tokens(1, size, seed=size)[0] for size in (18, 12, 12, 7)]
    ids, mask = left_padded(rows)
    packed = torch.cat((rows[0], rows[3], rows[1]))[None], torch.cat((rows[2], rows[2]))[None]
    runs = (
        torch.tensor([0] * 18 + [1] * 7 + [2] * 12)[None],
        torch.tensor([0] * 12 + [1] * 12)[None],
    )
    calibrations = {
        "alone": [row[None] for row in (*rows, rows[2])],
        "padded": [{"input_ids": ids, "attention_mask": mask}, rows[2][None]],
        "packed": [{"input_ids": x, "sequence_ids": y} for x, y in zip(packed, runs, strict=True)],
    }
    fits = {}
    for name, batches in calibrations.items():
        model = build_one("exact")
        convert(model, FITTED, batches)
        fits[name] = mechanisms(model)[-1].feature_map
    assert (fits["alone"].center != 0).any()
    assert_fitted_alike(fits["padded"], fits["alone"])
    assert_fitted_alike(fits["packed"], fits["alone"])


def assert_untouched(model):
    assert model.config.attention == "exact"
    assert [type(x) for x in mechanisms(model)] == [ExactMechanism] * 2
    assert not any(x._forward_pre_hooks for x in mechanisms(model))


@pytest.mark.parametrize(
    ("settings", "calibration", "error", "words"),
    [
        (FITTED, None, ValueError, "'data_aware' is fitted to data: pass calibration"),
        (FITTED, [], ValueError, "at least one batch"),
        (FITTED, [tokens(1, 5), 3], TypeError, "tensor, a tuple .* got int"),
        (
            Conversion(estimator="optimal", window=LENGTH),
            [tokens(2, LENGTH)],
            ValueError,
            "nothing to fit in performer.layers.0.attention",
        ),
        (Conversion(layers=(5,)), None, ValueError, r"layers must be in 0..1"),
        (Conversion(num_features=0), None, ValueError, "num_features"),
        (
            Conversion(num_features=7, estimator="hyperbolic"),
            None,
            ValueError,
            "num_features must be a positive even",
        ),
        (Conversion(estimator="best"), None, ValueError, "estimator must be one of"),
        (Conversion(learned=True), None, ValueError, "learned features"),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(settings, calibration, error, words):
    model = build()
    before = outputs(model)
    with pytest.raises(error, match=words):
        convert(model, settings, calibration)
    assert_untouched(model)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu", "identity"])
def test_models_without_exact_attention_are_refused(attention):
    model = PerformerForMaskedLM(make_config(attention))
    words = "linear attention already" if "favor" in attention else "computes no attention"
    with pytest.raises(ValueError, match=f"{words}.*start from a model with attention='exact'"):
        convert(model)
    twice = build()
    convert(twice)
    with pytest.raises(ValueError, match="linear attention already"):
        convert(twice)
