"""Outputs, gradients, weights and modes of converted models of every family."""

import copy
import io
import warnings

import pytest
import torch

from performers.convert import to_performer
from tests.convert.models import (
    ALL,
    CAUSAL,
    CLOSE,
    COVERING,
    ENCODERS,
    KINDS,
    PADDED,
    TRANSFORMERS,
    build,
    converted,
    favors,
    inputs,
    linear,
    main_output,
    output,
    padding_mask,
    seeded,
    token_ids,
    tried,
)

FAMILIES = ["bert", "performer_masked", "torch_encoder"]
# Rotary positions, or positions from the mask: padding on the left needs no position_ids.
LEFT = ["llama", "qwen2", "gpt_neox", "gemma", "phi3", "opt", "performer_causal"]
UNCACHED = {"use_cache": False}


def masked(name, mask):
    """The argument that tells a model of its padding."""
    return {"src_key_padding_mask": mask == 0} if name in FAMILIES[2:] else {"attention_mask": mask}


def uncached(model):
    return UNCACHED if getattr(model.config.get_text_config(), "use_cache", False) else {}


LISTED = {"num_features": 16, "listed_keys": 1000}


@pytest.mark.parametrize(
    ("name", "options"),
    [(x, {"window": COVERING}) for x in ALL] + [(x, LISTED) for x in (*ENCODERS, "vit", "hubert")],
)
def test_exact_pairs_that_cover_everything_give_the_original(name, options):
    model, given = build(name), inputs(name)
    expected = output(model, given)
    close = {"atol": 2e-5, "rtol": 1e-5} if options is LISTED else CLOSE
    torch.testing.assert_close(output(linear(name, **options), given), expected, **close)
    if options is not LISTED:
        # Nothing in this comparison is weak: features alone are far from the original.
        far = output(linear(name, **KINDS["features"]), given)
        assert (far - expected).abs().max() > 0.02 * expected.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tried(*PADDED, "bart", "torch_encoder"))
def test_a_covering_window_gives_the_original_of_padded_rows(name, side):
    model, given = build(name), inputs(name)
    mask = padding_mask(2, 20, side)
    expected = output(model, given, **masked(name, mask))
    got = output(linear(name, window=COVERING), given, **masked(name, mask))
    keep = torch.ones(got.shape[:2], dtype=torch.bool) if name == "bart" else mask.bool()
    torch.testing.assert_close(got[keep], expected[keep], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", tried(*PADDED, "torch_encoder"))
def test_padding_makes_no_difference(name, kind):
    model = linear(name, **KINDS[kind])
    mask = padding_mask(2, 20, "right")
    ((key, x),) = inputs(name).items()
    keep = mask.bool().view(2, 20, *[1] * (x.ndim - 2))
    first, second = (
        output(model, {key: y}, **masked(name, mask)) for y in (x, torch.where(keep, x, x.flip(1)))
    )
    torch.testing.assert_close(first[mask.bool()], second[mask.bool()])
    alone = output(model, {key: x[1:, :13]})
    torch.testing.assert_close(first[1:, :13], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "gemma3", "performer_masked"])
def test_a_row_of_padding_alone_stays_finite(name):
    model, mask = linear(name, **KINDS["exact terms"]), torch.ones(2, 20)
    mask[1] = 0
    padded = output(model, inputs(name), attention_mask=mask)
    assert padded.isfinite().all()
    alone = output(model, {"input_ids": inputs(name)["input_ids"][:1]})
    torch.testing.assert_close(padded[:1], alone, **CLOSE)


@pytest.mark.parametrize(
    ("name", "told"),
    [(x, False) for x in LEFT] + [(x, True) for x in CAUSAL if x not in ("bert_decoder", "opt")],
)
def test_left_padding_of_a_decoder_makes_no_difference(name, told):
    model = linear(name, **KINDS["exact terms"])
    ids, mask = token_ids(2, 20), padding_mask(2, 20, "left")
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if told else {}
    padded = output(model, {"input_ids": ids}, attention_mask=mask, **positions, **UNCACHED)
    alone = output(model, {"input_ids": ids[1:, 7:]}, **UNCACHED)
    torch.testing.assert_close(padded[1:, 7:], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gpt_neox", "gemma3", "performer_causal", "performer_masked"]
)
def test_packed_sequences_equal_sequences_alone(name):
    """Sequences are told apart by their positions, in each row by its own."""
    model = converted(build(name), num_features=16, window=2, sinks=1).train()
    ids = token_ids(2, 24)
    splits = [[5, 12, 7], [3, 21]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in splits])
    options = UNCACHED if name in CAUSAL else {}
    packed = model(ids, position_ids=positions, **options).logits
    for row, lengths in enumerate(splits):
        parts = ids[row : row + 1].split(lengths, 1)
        alone = [output(model, {"input_ids": x}, **options) for x in parts]
        torch.testing.assert_close(packed[row], torch.cat(alone, 1)[0], atol=2e-5, rtol=1e-4)
    packed.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "bart", *FAMILIES])
def test_other_precisions(name, dtype):
    model, given = build(name), inputs(name)
    expected = output(model, given)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            got = output(converted(model, window=COVERING), given)
        assert (got.float() - expected).abs().max() < tolerance * expected.abs().max()
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in given.items()}
    for other in (
        converted(model.to(dtype), window=COVERING),
        converted(model.float(), window=COVERING).to(dtype),
    ):
        got = output(other, given)
        assert got.dtype == dtype
        assert (got.float() - expected).abs().max() < tolerance * expected.abs().max()
    least = torch.promote_types(dtype, torch.float32)
    assert {x.feature_map.weight.dtype for x in favors(other)} == {least}


@pytest.mark.parametrize("layers", [[-1], [1, 1, 0]])
@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_layers_says_which_become_linear(name, layers):
    model, given = build(name), inputs(name)
    part = converted(model, num_features=16, layers=layers)
    names = [n for n, x in part.named_modules() if x in favors(part)]
    assert [int("".join(filter(str.isdigit, n))) for n in names] == sorted({x % 2 for x in layers})
    expected = output(model, given)
    assert not torch.allclose(output(part, given), expected, atol=1e-3)
    whole = converted(model, window=COVERING, layers=layers)
    torch.testing.assert_close(output(whole, given), expected, **CLOSE)


@pytest.mark.parametrize("name", ["gemma3", "modernbert"])
def test_layers_with_a_window_of_their_own_stay_exact(name):
    model, mixed = build(name), linear(name, window=COVERING)
    assert len(favors(mixed)) == model.config.num_hidden_layers - 1
    # Long enough for the blocks in which such layers are computed.
    long = inputs(name, length=60)
    torch.testing.assert_close(output(mixed, long), output(model, long), **CLOSE)


@pytest.mark.parametrize("name", ["bart", "torch_decoder"])
def test_cross_attention_is_converted_when_asked_for(name):
    model, given = build(name), inputs(name)
    expected = output(model, given)
    options = {"window": COVERING, "sinks": 2, "cross_attention": True}
    many, few = (converted(model, num_features=n, **options) for n in (2048, 16))
    plain = linear(name, window=COVERING)
    assert len(favors(many)) - len(favors(plain)) == 2
    # Attention to other tokens has no neighbours: features alone.
    assert [x.window for x in favors(many)].count(None) == 2
    error = (output(many, given) - expected).square().mean()
    assert 0 < error < (output(few, given) - expected).square().mean() / 4


@pytest.mark.parametrize("name", tried(*TRANSFORMERS))
def test_every_layer_is_tried_before_it_is_converted(name):
    model, called = build(name), set()
    handles = [x.register_forward_hook(lambda x, *_: called.add(x)) for x in model.modules()]
    to_performer(model, num_features=8)
    for handle in handles:
        handle.remove()
    changed = [x for x in model.modules() if getattr(x, "favor", None) is not None]
    assert changed
    assert called.issuperset(changed)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_weights_modes_and_random_numbers_are_left_as_they_were(name, calibrated):
    model, given = build(name).train(), inputs(name)
    first, last = next(x for x in model.modules() if isinstance(x, torch.nn.ModuleList))
    first.eval()
    next(last.parameters()).requires_grad_(False)
    before = dict(model.named_parameters())
    values = {key: x.clone() for key, x in model.state_dict().items()}
    modes = {key: x.training for key, x in model.named_modules()}
    frozen = {key: x.requires_grad for key, x in before.items()}
    state = torch.get_rng_state()
    options = {"estimator": "data_aware", "calibration": [given]} if calibrated else {}
    assert to_performer(model, num_features=16, generator=seeded(), **options) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[key] for key, parameter in model.named_parameters())
    assert all(torch.equal(model.state_dict()[key], x) for key, x in values.items())
    assert {key: x.requires_grad for key, x in model.named_parameters()} == frozen
    assert all(p.grad is None for p in model.parameters())
    after = {key: x.training for key, x in model.named_modules()}
    assert {key: after[key] for key in modes} == modes
    added = {key.split(".")[-1] for key in model.state_dict() if key not in values}
    assert "weight" in added or "log_weight" in added
    assert len({x.training for x in favors(model)}) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_drawn_from_the_generator_one_per_head(name):
    first, again, other = (
        [x.feature_map.weight for x in favors(converted(build(name), generator=seeded(seed)))]
        for seed in (3, 3, 4)
    )
    assert first[0].shape[0] == 4
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_state_dict_holds_features_and_fits(name):
    given, fitted = inputs(name, length=30), {"estimator": "data_aware", "window": 2, "sinks": 1}
    model = converted(build(name), num_features=16, calibration=[given], **fitted)
    batch = [inputs(name, seed=9)]
    other = converted(build(name, seed=1), num_features=16, calibration=batch, **fitted)
    assert (output(model, given) - output(other, given)).abs().max() > 1e-2
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(output(other, given), output(model, given))


@pytest.mark.parametrize("name", tried(*ALL))
def test_every_weight_has_a_gradient_in_training(name):
    reached, expected = (
        {key for key, x in gradients(model.train(), name).items() if x is not None}
        for model in (copy.deepcopy(linear(name, **KINDS["exact terms"])), build(name))
    )
    assert reached == expected
    assert len(reached) > 10


def gradients(model, name):
    main_output(model(**inputs(name))).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return {key: p.grad for key, p in model.named_parameters()}


# transformers calls its own deprecated methods.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = copy.deepcopy(linear(name, **KINDS["exact terms"])).train()
    plain = {key: None if x is None else x.clone() for key, x in gradients(model, name).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    for key, gradient in gradients(model, name).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, plain[key])


DROPOUT = {
    "attention_probs_dropout_prob": ["bert", "albert", "dinov2"],
    "attention_dropout": ["distilbert", "modernbert", "gpt_neox", "llama", "opt", "bart"],
    "attn_pdrop": ["gpt2"],
    "dropout": ["torch_encoder"],
}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for option, names in DROPOUT.items() for name in names]
)
def test_dropout_of_weights_is_switched_off_with_a_warning(name, option):
    model = build(name, **{option: 0.3}).train()
    others = [x for x in model.modules() if isinstance(x, torch.nn.Dropout) and x.p == 0.3]
    with pytest.warns(UserWarning, match=r"dropout of attention weights \(0\.3\)") as caught:
        to_performer(model, num_features=16)
    assert caught[0].filename == __file__
    model(**inputs(name))
    if name == "torch_encoder":
        # Dropout of anything else stays.
        assert all(x.p == 0.3 for x in others)
        attention, x = model.layers[0].self_attn, inputs(name)["src"]
        assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])


@pytest.mark.parametrize("name", ["bert", "torch_encoder"])
def test_dropout_is_switched_off_without_a_word_where_none_acts(name):
    option = "dropout" if name == "torch_encoder" else "attention_probs_dropout_prob"
    model = build(name, **{option: 0.3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_performer(model, num_features=16)
        first, second = (output(model.eval(), inputs(name)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", tried(*TRANSFORMERS))
@torch.no_grad()
def test_attention_maps(name):
    model, given = build(name), inputs(name)
    options = {**given, "output_attentions": True, **uncached(model)}
    maps = linear(name, **(LISTED if name == "bert" else {"window": COVERING}))(**options)
    features = linear(name, **KINDS["exact terms"])(**options)
    model.set_attn_implementation("eager")
    expected = model(**options)
    kinds = [key for key in expected if key.endswith("attentions")]
    assert sum(len(expected[key]) for key in kinds) >= 2
    for key in kinds:
        assert len(maps[key]) == len(expected[key])
        for got, other, want in zip(maps[key], features[key], expected[key], strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(other.sum(-1), torch.ones_like(other[..., 0]))


def test_switching_the_implementation_gives_the_exact_model_back():
    exact, given = build("llama"), inputs("llama")
    model = copy.deepcopy(linear("llama", **KINDS["features"]))
    before = output(model, given)
    model.set_attn_implementation("sdpa")
    assert torch.equal(output(model, given), output(exact, given))
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**given, **options), exact.generate(**given, **options))
    model.set_attn_implementation("favor")
    assert torch.equal(output(model, given), before)
