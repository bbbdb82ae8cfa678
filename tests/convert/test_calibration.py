"""Features fitted to what the exact model computes."""

import pytest
import torch
from transformers import BatchEncoding

from performers.convert import to_performer
from performers.convert.families.base import call_model
from tests.convert.architectures import (
    build,
    converted,
    inputs,
    output,
    padding_mask,
    sharpen,
    token_ids,
)
from tests.convert.test_refusals import untouched


def calibrated(model, batches, **options):
    options = {"num_features": 32, "estimator": "data_aware", **options}
    return converted(model, calibration=batches, **options)


def buffers(model):
    return {name: x for name, x in model.named_buffers() if ".favor." in name}


def assert_same_features(first, second):
    assert buffers(first).keys() == buffers(second).keys() != set()
    for name, tensor in buffers(first).items():
        torch.testing.assert_close(tensor, buffers(second)[name], atol=1e-4, rtol=1e-3)


def assert_other_features(first, second):
    pairs = [(x, buffers(second).get(name)) for name, x in buffers(first).items()]
    assert any(y is None or not torch.allclose(x, y, atol=1e-2) for x, y in pairs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3", "vit", "bart", "whisper"])
def test_batches_add_up(name):
    model, whole = build(name), inputs(name, rows=6, length=24)
    batches = [{key: x[i : i + 2] for key, x in whole.items()} for i in (0, 2, 4)]
    streamed = calibrated(model, (batch for batch in batches), window=2)
    assert_same_features(streamed, calibrated(model, [whole], window=2))
    assert_other_features(streamed, calibrated(model, batches[:1], window=2))
    assert_other_features(streamed, converted(model, num_features=32, window=2))


@pytest.mark.exhaustive
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_padding_is_not_part_of_the_statistics(name, side):
    model, given = build(name), inputs(name, rows=4, length=24)
    # A model's positions would differ with padding on the left: only what is masked changes.
    given["attention_mask"] = padding_mask(4, 24, side)
    ids = torch.where(given["attention_mask"].bool(), given["input_ids"], 7)
    first = calibrated(model, [given])
    assert_same_features(first, calibrated(model, [{**given, "input_ids": ids}]))
    del given["attention_mask"]
    assert_other_features(first, calibrated(model, [{**given, "input_ids": ids}]))


def test_calibration_sees_the_exact_model():
    """The statistics of the last layer do not depend on whether those before it are converted."""
    model, batch = build("bert"), inputs("bert", rows=6, length=24)
    every, last = calibrated(model, [batch]), calibrated(model, [batch], layers=[-1])
    tensors = buffers(last)
    assert tensors
    # The draws differ: what is compared is the fit alone.
    for part in (every, last):
        part.bert.encoder.layer[-1].attention.self.favor.feature_map.redraw_(
            torch.Generator().manual_seed(3)
        )
    for name, tensor in tensors.items():
        torch.testing.assert_close(buffers(every)[name], tensor)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_calibration_lowers_the_error_of_the_output(name):
    model = sharpen(build(name), deviation=0.15)
    batches = [inputs(name, rows=8, length=32, seed=seed) for seed in range(3)]
    held_out = inputs(name, rows=4, length=32, seed=9)
    expected = output(model, held_out)

    def error(**options):
        total = 0.0
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            part = converted(model, num_features=64, generator=generator, **options)
            total += float((output(part, held_out) - expected).square().mean())
        return total

    plain = error()
    assert error(estimator="data_aware", calibration=batches) < 0.8 * plain


def test_modes_are_left_as_they_were():
    model = build("bert")
    model.train()
    model.bert.encoder.layer[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    to_performer(
        model, num_features=16, estimator="data_aware", calibration=[inputs("bert", 4, 24)]
    )
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in before} == before


def test_weights_are_left_as_they_were():
    model = build("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    part = calibrated(model, [inputs("llama", 4, 24)])
    assert all(torch.equal(part.state_dict()[name], x) for name, x in before.items())
    assert all(p.grad is None for p in part.parameters())


def failing(batch, error):
    yield batch
    raise error


class Interruption(Exception):
    pass


BAD = {
    "an error of the data": (
        lambda batch: failing(batch, Interruption("disc full")),
        Interruption,
        "disc full",
    ),
    "not a batch": (lambda batch: [batch, "text"], TypeError, "a batch of calibration must be"),
    "no batch": (lambda batch: [], ValueError, "at least one batch"),
    "an unknown argument": (
        lambda batch: [batch, {"pixels": batch["input_ids"]}],
        ValueError,
        "input_ids or inputs_embeds",
    ),
    "tokens that do not exist": (
        lambda batch: [batch, {"input_ids": batch["input_ids"] + 100}],
        IndexError,
        "out of range",
    ),
    "a mask of one's own": (
        lambda batch: [batch, {**batch, "attention_mask": torch.ones(4, 1, 24, 24).bool()}],
        ValueError,
        "mask of shape",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_goes_wrong_leaves_the_model_as_it_was(name, bad):
    batches, error, sentence = BAD[bad]
    model, given = build(name), inputs(name, rows=4, length=24)
    expected = output(model, given)
    model.train()
    with pytest.raises(error, match=sentence):
        to_performer(
            model, num_features=16, estimator="data_aware", calibration=batches(dict(given))
        )
    assert untouched(model, "sdpa")
    assert all(module.training for module in model.modules())
    assert torch.equal(output(model.eval(), given), expected)
    torch.testing.assert_close(
        output(to_performer(model, window=64), given), expected, atol=1e-5, rtol=1e-5
    )


def test_batches_that_leave_nothing_to_fit_are_refused():
    model = build("bert")
    with pytest.raises(ValueError, match=r"leaves nothing to fit in bert\.encoder\.layer\.0"):
        calibrated(model, [inputs("bert", length=8)], window=16)


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_sequences_count_as_sequences_alone(rows):
    model, ids = build("llama"), token_ids(rows, 36)
    positions = torch.cat([torch.arange(n) for n in (10, 26)]).expand(rows, -1)
    packed = calibrated(model, [{"input_ids": ids, "position_ids": positions}], window=2)
    alone = [{"input_ids": part} for part in ids.split([10, 26], 1)]
    assert_same_features(packed, calibrated(model, alone, window=2))


def test_batches_may_be_tensors_encodings_or_have_labels():
    model, ids = build("llama"), token_ids(4, 24)
    expected = calibrated(model, [{"input_ids": ids}])
    for batch in (ids, BatchEncoding({"input_ids": ids}), {"input_ids": ids, "labels": ids}):
        assert_same_features(calibrated(model, [batch]), expected)


def test_labels_make_the_inputs_of_a_decoder():
    model, ids, labels = build("bart"), token_ids(4, 24), token_ids(4, 16, seed=1)
    shifted = torch.cat((torch.full((4, 1), 1), labels[:, :-1]), 1)
    first = calibrated(model, [{"input_ids": ids, "labels": labels}])
    second = calibrated(model, [{"input_ids": ids, "decoder_input_ids": shifted}])
    assert_same_features(first, second)


def test_running_a_model_makes_no_cache():
    for name in ("llama", "bart"):
        result = call_model(build(name), **inputs(name))
        assert result.past_key_values is None


def test_cross_attention_is_calibrated():
    model, batch = build("bart"), inputs("bart", rows=6, length=24)
    batch["attention_mask"] = padding_mask(6, 24, "right")
    part = calibrated(model, [batch], cross_attention=True)
    names = [name for name in buffers(part) if "encoder_attn" in name]
    assert names
    plain = calibrated(model, [batch])
    assert {n for n in buffers(part) if n not in buffers(plain)} == set(names)
    assert output(part, batch).isfinite().all()
