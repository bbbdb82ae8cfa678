"""What a converted model computes, for every architecture."""

import copy
import io

import pytest
import torch
import transformers

from performers import redraw_features_
from performers.convert import to_performer
from tests.convert.architectures import (
    ARCHITECTURES,
    DECODERS,
    PADDED,
    build,
    converted,
    inputs,
    output,
    padding_mask,
    sharpen,
    token_ids,
)

COVERING = 64
ALL = list(ARCHITECTURES)
# Their local layers keep to themselves; what is converted is the rest.
HYBRIDS = ["gemma3", "modernbert"]


def features(model):
    return [x for name, x in model.named_modules() if name.endswith("favor.feature_map")]


@pytest.mark.parametrize("name", ALL)
def test_a_window_that_covers_the_sequence_gives_the_original(name):
    model, given = build(name), inputs(name)
    expected = output(model, given)
    torch.testing.assert_close(
        output(converted(model, window=COVERING), given), expected, atol=1e-5, rtol=1e-5
    )
    # Nothing in this comparison is weak: features alone are far from the original.
    far = output(converted(model, num_features=16), given)
    assert (far - expected).abs().max() > 0.02 * expected.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*PADDED, "bart"])
def test_a_covering_window_gives_the_original_of_padded_rows(name, side):
    model, given = build(name), inputs(name)
    mask = padding_mask(2, 20, side)
    expected = output(model, given, attention_mask=mask)
    got = output(converted(model, window=COVERING), given, attention_mask=mask)
    keep = mask.bool() if name in PADDED else torch.ones(got.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(got[keep], expected[keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", PADDED)
def test_what_is_padding_makes_no_difference(name, window):
    model = converted(build(name), num_features=16, window=window, sinks=2)
    mask = padding_mask(2, 20, "right")
    ids = token_ids(2, 20)
    other = torch.where(mask.bool(), ids, ids.flip(1))
    first, second = (output(model, {"input_ids": x}, attention_mask=mask) for x in (ids, other))
    torch.testing.assert_close(first[mask.bool()], second[mask.bool()])
    alone = output(model, {"input_ids": ids[1:, :13]})
    torch.testing.assert_close(first[1:, :13], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "gemma3"])
def test_a_row_of_padding_alone_stays_finite(name):
    model, mask = converted(build(name), num_features=16, window=3), torch.ones(2, 20)
    mask[1] = 0
    padded = output(model, inputs(name), attention_mask=mask)
    assert padded.isfinite().all()
    alone = output(model, {"input_ids": inputs(name)["input_ids"][:1]})
    torch.testing.assert_close(padded[:1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [x for x in DECODERS if x != "bert_decoder"])
def test_left_padding_of_a_decoder_makes_no_difference(name):
    model = converted(build(name), num_features=16, window=3, sinks=2)
    ids, mask = token_ids(2, 20), padding_mask(2, 20, "left")
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    takes = {} if name == "opt" else {"position_ids": positions}
    padded = output(model, {"input_ids": ids}, attention_mask=mask, **takes)
    alone = output(model, {"input_ids": ids[1:, 7:]})
    torch.testing.assert_close(padded[1:, 7:], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["bert", "llama", "whisper"])
def test_features_alone_approach_the_original(name):
    model, given = sharpen(build(name), deviation=0.05), inputs(name)
    expected = output(model, given)

    def error(count):
        draws = (torch.Generator().manual_seed(seed) for seed in range(4))
        runs = [output(converted(model, num_features=count, generator=x), given) for x in draws]
        return sum(float((run - expected).square().mean()) for run in runs) / 4

    few, many = error(16), error(1024)
    # The mean square falls as one over the number of features: by 64 here.
    assert many < few / 16
    assert many < 1e-3 * float(expected.square().mean())


@pytest.mark.parametrize("name", DECODERS)
def test_later_tokens_do_not_move_earlier_outputs(name):
    model = converted(build(name), num_features=16, window=3, sinks=1)
    ids = token_ids(2, 20)
    changed = ids.clone()
    changed[:, 13:] = token_ids(2, 7, seed=9)
    first, second = (output(model, {"input_ids": x}) for x in (ids, changed))
    torch.testing.assert_close(first[:, :13], second[:, :13], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3", "vit", "bart"])
def test_other_precisions(name, dtype):
    model = build(name)
    given = inputs(name)
    expected = output(model, given)
    other = converted(model, window=COVERING).to(dtype)
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in given.items()}
    got = output(other, given)
    assert got.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    assert (got.float() - expected).abs().max() < tolerance * expected.abs().max()
    least = {torch.bfloat16: torch.float32, torch.float64: torch.float64}[dtype]
    assert {x.weight.dtype for x in features(other)} == {least}


def test_autocast():
    model, given = build("llama"), inputs("llama")
    expected = output(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        got = output(converted(model, window=COVERING), given)
    assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.exhaustive
@pytest.mark.parametrize("layers", [[0], [-1], [0, 1]])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_layers_says_which_become_linear(name, layers):
    model = build(name)
    part = converted(model, num_features=16, layers=layers)
    assert len(features(part)) == len(layers)
    expected = output(model, inputs(name))
    got = output(converted(model, window=COVERING, layers=layers), inputs(name))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output(part, inputs(name)), expected, atol=1e-3)
    indices = [int("".join(filter(str.isdigit, n))) for n, _ in _blocks(part)]
    assert indices == [x % 2 for x in layers]


def _blocks(model):
    return [(n, x) for n, x in model.named_modules() if n.endswith(".favor")]


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_with_a_window_of_their_own_stay_exact(name):
    model = build(name)
    total = model.config.num_hidden_layers
    assert len(features(converted(model, num_features=16))) == total - 1
    long = inputs(name, length=60)
    # Long enough for the blocks of sliding_attention.
    expected = output(model, long)
    got = output(converted(model, window=COVERING), long)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_model_of_local_layers_has_nothing_to_convert():
    model = build("mistral", sliding_window=6)
    with pytest.raises(ValueError, match="sliding window already"):
        to_performer(model)


def test_cross_attention_is_converted_when_asked_for():
    model, given = build("bart"), inputs("bart")
    with_cross = converted(model, window=COVERING, cross_attention=True, num_features=2048)
    assert len(features(with_cross)) == 6
    assert len(features(converted(model))) == 4
    expected = output(model, given)
    error = (output(with_cross, given) - expected).square().mean()
    few = converted(model, window=COVERING, cross_attention=True, num_features=16)
    assert 0 < error < (output(few, given) - expected).square().mean() / 4


def test_a_copy_is_independent():
    model = converted(build("llama"), num_features=16)
    twin = copy.deepcopy(model)
    given = inputs("llama")
    before = output(model, given)
    torch.testing.assert_close(output(twin, given), before, atol=0, rtol=0)
    redraw_features_(twin, torch.Generator().manual_seed(5))
    assert not torch.allclose(output(twin, given), before, atol=1e-3)
    torch.testing.assert_close(output(model, given), before, atol=0, rtol=0)


def test_the_state_dict_holds_the_features():
    model = converted(build("bert"), num_features=16)
    other = to_performer(build("bert", seed=1), num_features=16)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    given = inputs("bert")
    assert torch.equal(output(other, given), output(model, given))


def test_switching_the_implementation_gives_the_exact_model_back():
    model, given = build("llama"), inputs("llama")
    linear = converted(model, num_features=16)
    before = output(linear, given)
    linear.set_attn_implementation("sdpa")
    torch.testing.assert_close(output(linear, given), output(model, given), atol=0, rtol=0)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(linear.generate(**given, **options), model.generate(**given, **options))
    linear.set_attn_implementation("favor")
    assert torch.equal(output(linear, given), before)


def test_input_embeddings():
    for name in ("bert", "llama"):
        model, given = converted(build(name), num_features=16, window=2), inputs(name)
        embedded = model.get_input_embeddings()(given["input_ids"])
        got = output(model, {"inputs_embeds": embedded})
        torch.testing.assert_close(got, output(model, given))


@pytest.mark.slow
def test_compiled_models_compute_the_same():
    model = converted(build("bert", num_hidden_layers=1), num_features=16, window=2)
    compiled = torch.compile(model, backend="eager")
    for side in ("none", "right"):
        mask = padding_mask(2, 20, side)
        expected = output(model, inputs("bert"), attention_mask=mask)
        got = output(compiled, inputs("bert"), attention_mask=mask)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_vision_language_models():
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 60,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
        image_token_index=59,
    )
    model = sharpen(transformers.LlavaForConditionalGeneration(config))
    ids = token_ids(2, 24).clamp_max(58)
    ids[:, :16] = 59
    generator = torch.Generator().manual_seed(0)
    given = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    expected = output(model, given)
    got = output(converted(model, window=COVERING), given)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    linear = converted(model, num_features=16, window=2)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # A second image without pixels would be refused.
    options["suppress_tokens"] = [59]
    cached = linear.generate(**given, **options)
    assert torch.equal(cached, linear.generate(**given, **options, use_cache=False))
