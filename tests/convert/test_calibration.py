"""Features fitted to what the exact model computes."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BatchEncoding

from performers import SoftmaxFeatures
from performers.convert import to_performer
from performers.models.arguments import CACHE_KEYWORD
from tests.convert.models import (
    CLOSE,
    COVERING,
    HEAD_DIM,
    HEADS,
    WIDTH,
    Wrapped,
    build,
    converted,
    favors,
    inputs,
    output,
    padding_mask,
    token_ids,
    torch_model,
)
from tests.convert.test_refusals import snapshot

FITTED = {"num_features": 16, "estimator": "data_aware"}
FAMILIES = ["bert", "llama", "performer_masked", "performer_causal", "torch_encoder"]


def calibrated(model, batches, **options):
    return converted(model, calibration=batches, **{**FITTED, **options})


def fits(model):
    """Fitted tensors: all tensors of the features but their draws."""
    return {
        f"{index}.{name}": tensor
        for index, favor in enumerate(favors(model))
        for name, tensor in favor.feature_map.named_buffers()
        if name != "weight"
    }


def same_fits(first, second):
    first, second = fits(first), fits(second)
    assert first.keys() == second.keys() != set()
    return all(torch.allclose(x, second[key], atol=1e-4, rtol=1e-3) for key, x in first.items())


def token_argument(name):
    return next(iter(inputs(name)))


def split_heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def queries_and_keys(model, batch):
    """Of every layer, as the exact model computes them."""
    exact, pairs = converted(model, window=COVERING), []

    def record(module, args):
        query, key = args[:2]
        if query.ndim == 3:
            # Torch's modules project them within.
            if not module.batch_first:
                query, key = query.transpose(0, 1), key.transpose(0, 1)
            weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
            query, key = (
                split_heads(F.linear(*each))
                for each in zip((query, key), weights[:2], biases[:2], strict=True)
            )
        pairs.append((query, key))

    for favor in favors(exact):
        favor.register_forward_pre_hook(record)
    output(exact, batch)
    return pairs


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "variant"),
    [(x, None) for x in FAMILIES] + [("torch_encoder", x) for x in ("sequence first", "causal")],
)
def test_features_are_fitted_to_queries_and_keys_of_the_exact_model(name, variant):
    batches = [inputs(name, *shape, seed=7) for shape in ((3, 20), (1, 30))]
    model = build(name) if variant is None else torch_model(batch_first=variant == "causal")
    if variant == "sequence first":
        batches = [{"src": x["src"].transpose(0, 1)} for x in batches]
    if variant == "causal":
        mask = torch.nn.Transformer.generate_square_subsequent_mask
        batches = [{**x, "mask": mask(x["src"].shape[1])} for x in batches]
    is_causal = variant == "causal" or name in ("llama", "performer_causal")
    exact = [queries_and_keys(model, batch) for batch in batches]
    fitted = calibrated(model, iter(batches), window=2, sinks=1)
    for layer, favor in enumerate(favors(fitted)):
        heads = exact[0][layer][1].shape[1]
        expected = SoftmaxFeatures(HEAD_DIM, 16, estimator="data_aware", num_heads=heads)
        for pairs in exact:
            expected.calibrate_(*pairs[layer], is_causal=is_causal, window=2, sinks=1)
        for key, tensor in expected.named_buffers():
            if key != "weight":
                found = getattr(favor.feature_map, key)
                torch.testing.assert_close(found, tensor, atol=1e-4, rtol=1e-3)
    assert not same_fits(fitted, calibrated(model, batches[:1], window=2, sinks=1))


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_and_packing_do_not_change_the_fit(name):
    """Each sequence alone, padded, or packed with others: the same pairs."""
    model, key = build(name), token_argument(name)
    x = inputs(name, rows=4, length=20)[key]
    lengths = (20, 13, 13, 7)
    mask = torch.arange(20) < torch.tensor([*lengths, 0]).unsqueeze(-1)
    # A row of padding alone counts for nothing, nor does what is at padding.
    padded = torch.where(
        mask.view(5, 20, *[1] * (x.ndim - 2)), torch.cat((x, x[:1])), x[3:].flip(1)
    )
    told = {"src_key_padding_mask": ~mask} if name == "torch_encoder" else {"attention_mask": mask}
    rows = [x[i : i + 1, :n] for i, n in enumerate(lengths)]
    alone = calibrated(model, [{key: row} for row in rows], window=2)
    assert same_fits(calibrated(model, [{key: padded, **told}], window=2), alone)
    assert not same_fits(calibrated(model, [{key: padded}], window=2), alone)
    if name in ("llama", "performer_masked", "performer_causal"):
        ids = torch.stack(
            (torch.cat((*rows[0], *rows[1])), torch.cat((*rows[3], *rows[2], *rows[1])))
        )
        positions = [torch.cat([torch.arange(n) for n in row]) for row in ((20, 13), (7, 13, 13))]
        packed = [{key: ids[i : i + 1], "position_ids": positions[i][None]} for i in range(2)]
        unpacked = [*rows, rows[1]]
        assert same_fits(
            calibrated(model, packed, window=2),
            calibrated(model, [{key: row} for row in unpacked], window=2),
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_cross_attention_is_fitted_without_padding(side):
    model, given = build("bart"), inputs("bart", rows=4, length=24)
    given["attention_mask"] = padding_mask(4, 24, side)
    ids = torch.where(given["attention_mask"].bool(), given["input_ids"], 7)
    fitted = calibrated(model, [given], cross_attention=True)
    assert len(favors(fitted)) - len(favors(calibrated(model, [given]))) == 2
    assert same_fits(fitted, calibrated(model, [{**given, "input_ids": ids}], cross_attention=True))
    assert output(fitted, given).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "torch_encoder"])
def test_batches_may_be_arguments_of_any_kind(name):
    model, key = build(name), token_argument(name)
    x = inputs(name, rows=4)[key]
    kinds = [x, (x,), [x], {key: x}]
    if name != "torch_encoder":
        kinds += [BatchEncoding({key: x}), {key: x, "labels": x}]
    expected = calibrated(model, (batch for batch in [x]))
    assert all(same_fits(calibrated(model, [batch]), expected) for batch in kinds)


def test_all_arguments_of_a_batch_by_position_count():
    """The mask of the second one, too."""
    model, ids, mask = build("bert"), token_ids(4, 20), padding_mask(4, 20, "right")
    ids[-1, 13:] = 0
    expected = calibrated(model, [{"input_ids": ids, "attention_mask": mask}])
    assert same_fits(calibrated(model, [(ids, mask)]), expected)
    assert not same_fits(calibrated(model, [ids]), expected)


def test_labels_make_the_inputs_of_a_decoder():
    model, ids, labels = build("bart"), token_ids(4, 24), token_ids(4, 16, seed=1)
    start = torch.full((4, 1), model.config.decoder_start_token_id)
    shifted = torch.cat((start, labels[:, :-1]), 1)
    first = calibrated(model, [{"input_ids": ids, "labels": labels}])
    assert same_fits(first, calibrated(model, [{"input_ids": ids, "decoder_input_ids": shifted}]))


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_calibration_makes_no_cache(name):
    model, caches = build(name), []
    model.register_forward_hook(lambda *call: caches.append(getattr(call[-1], CACHE_KEYWORD)))
    to_performer(model, **FITTED, calibration=[inputs(name)])
    assert caches
    assert caches[-1] is None


def failing(batch):
    yield batch
    raise InterruptedError("disc full")


def shortened(batch):
    return [{key: x[:, :3] for key, x in batch.items()}]


def with_mask(name, mask):
    return lambda batch: [{**batch, name: mask}]


NOTHING = r"nothing to fit in [\w.]*layers?\.0.*window=3"
SQUARE = torch.ones(4, 1, 20, 20).bool()
# Calibration made of a batch, the error and its words.
BAD = [
    (failing, InterruptedError, "disc full"),
    (lambda batch: [batch, "text"], TypeError, "tensor, a tuple .* got str"),
    (lambda batch: [], ValueError, "at least one batch"),
    (lambda batch: None, ValueError, "'data_aware' is fitted to data: pass"),
    (shortened, ValueError, NOTHING),
]
OF_BERT = [
    (lambda x: [x, {"pixels": x["input_ids"]}], ValueError, "input_ids or inputs_embeds"),
    (lambda x: [x, {"input_ids": x["input_ids"] + 100}], IndexError, "out of range"),
    (with_mask("attention_mask", SQUARE), ValueError, "mask of shape"),
]
OF_TORCH = [
    (lambda x: [x, torch.full((1, 20, WIDTH), torch.nan)], ValueError, "self_attn: .*finite"),
    (with_mask("mask", torch.eye(20).bool()), ValueError, "layers.0.self_attn: attn_mask must be"),
]
# What fails in the middle leaves nothing behind in any family.
CASES = {"bert": BAD + OF_BERT, "performer_masked": BAD[:1], "torch_encoder": BAD[:1] + OF_TORCH}
CASES = [(name, *case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("name", "batches", "error", "words"), CASES)
def test_what_goes_wrong_leaves_the_model_as_it_was(name, batches, error, words):
    model, given = build(name), inputs(name, rows=4)
    expected = output(model, given)
    model.train()
    before, flag = snapshot(model), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(error, match=words):
        to_performer(model, **FITTED, window=3, calibration=batches(dict(given)))
    assert snapshot(model) == before
    assert torch.backends.mha.get_fastpath_enabled() is flag
    assert torch.equal(output(model.eval(), given), expected)
    torch.testing.assert_close(
        output(to_performer(model, window=COVERING), given), expected, **CLOSE
    )


@pytest.mark.parametrize("name", ["bert", "torch_encoder"])
def test_an_unused_calibration_is_said_to_be_unused(name):
    with pytest.warns(UserWarning, match="calibration is not used: estimator='positive'"):
        to_performer(build(name), calibration=[inputs(name)])


def test_one_batch_that_is_long_enough_is_fitted_to():
    batches = [inputs("torch_encoder", length=n) for n in (12, 24)]
    fitted = calibrated(build("torch_encoder"), batches, window=12)
    assert (favors(fitted)[0].feature_map.center != 0).any()


def test_layers_that_are_not_called_or_not_chosen():
    model = torch.nn.ModuleDict({"used": Wrapped(), "idle": Wrapped()})
    model.forward = lambda x: model["used"](x)
    batch = torch.randn(2, 9, WIDTH)
    with pytest.raises(ValueError, match=r"idle.attention: the model did not call it"):
        to_performer(model, **FITTED, calibration=[batch])
    to_performer(model, **FITTED, calibration=[batch], layers=[0])
    assert [name for name, x in model.named_modules() if x in favors(model)] == ["used.attention"]


def test_cross_attention_that_shows_when_it_is_called():
    pair = (torch.randn(3, 12, WIDTH), torch.randn(3, 20, WIDTH))
    for options, remedy in (
        ({}, "cross_attention=True"),
        ({"window": 2}, "layers"),
        ({"window": 2, "cross_attention": True}, "layers"),
    ):
        model = Wrapped()
        with pytest.raises(ValueError, match=f"attention attends from 12 .* to 20 .*{remedy}"):
            to_performer(model, **FITTED, **options, calibration=[pair])
        assert not favors(model)
    to_performer(model, **FITTED, cross_attention=True, calibration=[pair])
    assert model(*pair).shape == pair[0].shape
    windowed = to_performer(Wrapped(), window=2)
    with pytest.raises(ValueError, match="window needs as many keys as queries"):
        windowed(*pair)


@torch.no_grad()
@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_keys_without_a_position_are_fitted_to(option):
    model, x = Wrapped(**{option: True}), torch.randn(3, 12, WIDTH)
    padding = torch.arange(12) >= torch.tensor([[12], [9], [5]])
    attention = model.attention
    query, key = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)[:2]
    more = torch.zeros(3, 1, WIDTH)
    more = more if attention.bias_k is None else attention.bias_k.expand(3, 1, WIDTH)
    query, key = split_heads(query), split_heads(torch.cat((key, more), dim=1))
    mask = torch.cat((~padding, torch.ones(3, 1, dtype=torch.bool)), dim=1)
    expected = SoftmaxFeatures(HEAD_DIM, 16, estimator="data_aware", num_heads=HEADS)
    expected.calibrate_(query, key, mask)
    to_performer(model, **FITTED, calibration=[{"query": x, "key_padding_mask": padding}])
    for name in ("center", "transform", "query_transform"):
        found = getattr(model.attention.feature_map, name)
        torch.testing.assert_close(found, getattr(expected, name), **CLOSE)
