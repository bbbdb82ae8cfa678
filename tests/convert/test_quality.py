"""Figures of quality against what a loop over tokens computes."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from performers.convert.distillation import quality
from performers.convert.distillation.quality import kind_of, measure_quality
from tests.convert.models import build, converted, token_ids

PAD, MASK = 0, 4
TOKENIZER = SimpleNamespace(mask_token_id=MASK, all_special_ids=[0, 1, 2, 3, 4])


@pytest.fixture(scope="module")
def llamas():
    return [build("llama", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def berts():
    return [build("bert", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def encoders():
    return [build("electra", seed) for seed in (0, 1)]


def batches(lengths=((9, 9), (12, 5, 2)), side="right"):
    """Batches of rows of some lengths, padded."""
    made = []
    for number, rows in enumerate(lengths):
        ids = token_ids(len(rows), max(rows), seed=number)
        mask = torch.ones_like(ids)
        for row, length in enumerate(rows):
            padding = slice(length, None) if side == "right" else slice(0, max(rows) - length)
            mask[row, padding] = 0
            ids[row, padding] = PAD
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def rows_of(given):
    """Every row without its padding."""
    return [
        ids[mask.bool()]
        for batch in given
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize(
    ("models", "kind", "side"),
    [("llamas", "causal", "right"), ("llamas", "causal", "left"), ("berts", "masked", "right")],
)
def test_predictions(models, kind, side, request, monkeypatch):
    """Of the next token; of hidden tokens, with every ordinary token hidden.

    Rotary positions are relative, so that padding on the left changes nothing either.
    """
    monkeypatch.setattr(quality, "_MASKED", 1.0)
    model, reference = request.getfixturevalue(models)
    given = batches(side=side)
    given[0]["input_ids"][:, 0], given[0]["input_ids"][:, -1] = 2, 3
    found = measure_quality(model, reference, iter(given), kind, TOKENIZER)
    own, theirs, targets = [], [], []
    for ids in rows_of(given):
        places, asked, target = torch.arange(len(ids) - 1), ids, ids[1:]
        if kind == "masked":
            places, asked = torch.nonzero(ids > 4)[:, 0], torch.where(ids > 4, MASK, ids)
            target = ids[places]
        own.append(log_probabilities(model, asked)[places])
        theirs.append(log_probabilities(reference, asked)[places])
        targets.append(target)
    own, theirs, targets = map(torch.cat, (own, theirs, targets))
    assert found.tokens == len(targets) > 30
    assert found.perplexity == pytest.approx(float(F.nll_loss(own, targets).exp()), rel=1e-5)
    assert found.accuracy == pytest.approx(float((own.argmax(-1) == targets).double().mean()))
    divergence = float((theirs.exp() * (theirs - own)).sum(-1).mean())
    assert found.divergence == pytest.approx(divergence, rel=1e-5)
    assert set(found.figures()) == {"perplexity", "accuracy", "divergence"}


def test_all_models_are_asked_for_the_same_hidden_tokens(berts):
    asked = []
    for model, seed in ((berts[0], 3), (berts[1], 3), (berts[0], 4)):
        given = batches(((40, 40), (30, 3)))
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(kwargs["input_ids"]), with_kwargs=True
        )
        quality = measure_quality(model, None, given, "masked", TOKENIZER, seed=seed)
        hook.remove()
        # 15% of 40, 40 and 30, and at least one of 3.
        assert quality.tokens == 6 + 6 + round(0.15 * 30) + 1
        assert quality.divergence is None
        for seen, batch in zip(asked[-2:], given, strict=True):
            changed = seen != batch["input_ids"]
            assert set(seen[changed].tolist()) == {MASK}
            assert not changed[batch["attention_mask"] == 0].any()
    assert all(torch.equal(x, y) for x, y in zip(asked[:2], asked[2:4], strict=True))
    assert not torch.equal(asked[4], asked[0]), "another seed hides others"


def embeddings(model, given):
    with torch.no_grad():
        states = [model(input_ids=ids[None]).last_hidden_state[0] for ids in rows_of(given)]
    return F.normalize(torch.stack([x.double().mean(0) for x in states]), dim=-1)


def test_encoder(encoders):
    model, reference = encoders
    given = batches(((9, 9), (12, 5, 2), (7, 7, 7)))
    quality = measure_quality(model, reference, given)
    own, theirs = (embeddings(x, given) for x in encoders)
    assert quality.tokens == 9 + 9 + 12 + 5 + 2 + 21
    assert quality.cosine == pytest.approx(float((own * theirs).sum(-1).mean()), rel=1e-5)
    nearest = [(x @ x.T).fill_diagonal_(-2).argmax(-1) for x in (own, theirs)]
    same = float((nearest[0] == nearest[1]).double().mean())
    assert quality.retrieval == pytest.approx(same)
    assert 0 < same < 1, "the case tells the two apart"
    assert set(quality.figures()) == {"cosine", "retrieval"}
    # Two passages have no other to be nearest.
    few = measure_quality(model, reference, batches(((9, 9),)))
    assert few.retrieval is None
    assert set(few.figures()) == {"cosine"}


def test_a_model_beside_itself_has_lost_nothing(llamas, encoders):
    model = llamas[0]
    exact = measure_quality(model, model, batches())
    assert exact.divergence is None
    beside = measure_quality(converted(model, window=20), model, batches())
    assert beside.perplexity == pytest.approx(exact.perplexity, rel=1e-4)
    assert beside.divergence == pytest.approx(0, abs=1e-6)
    assert measure_quality(converted(model), model, batches()).divergence > 1e-3
    quality = measure_quality(encoders[0], encoders[0], batches())
    assert (quality.cosine, quality.retrieval) == (pytest.approx(1.0), 1.0)


def test_padding_may_hold_anything(encoders):
    """A model is free to give NaN where nothing takes part."""

    def poison(module, args, kwargs, output):
        output.last_hidden_state[kwargs["attention_mask"] == 0] = math.nan

    poisoned = copy.deepcopy(encoders[0])
    poisoned.register_forward_hook(poison, with_kwargs=True)
    quality = measure_quality(poisoned, encoders[0], batches(), "encoder")
    assert quality.cosine == pytest.approx(1.0)


def test_a_hopeless_perplexity_is_infinite_and_modes_stay(llamas):
    model = copy.deepcopy(llamas[0]).train()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    quality = measure_quality(model, llamas[1], batches())
    assert quality.perplexity == math.inf
    assert quality.figures()["perplexity"] == math.inf
    assert model.training
    assert not llamas[1].training


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "causal"),
        ("gpt2", "causal"),
        ("performer_causal", "causal"),
        ("bert", "masked"),
        ("performer_masked", "masked"),
        ("electra", "encoder"),
        ("performer", "encoder"),
    ],
)
def test_kinds_are_told_by_the_class(name, kind):
    assert kind_of(build(name)) == kind
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
        kind_of(build("bart"))


@pytest.mark.parametrize(
    ("model", "given", "options", "words"),
    [
        ("berts", None, {}, "tokenizer must have a mask token"),
        ("llamas", ((1, 1),), {}, "batches have nothing to predict"),
        ("llamas", (), {"kind": "encoder"}, "at least one batch, got none"),
        ("llamas", None, {"kind": "clm"}, "kind must be one of .*'causal'.*got 'clm'"),
    ],
)
def test_what_cannot_be_measured(model, given, options, words, request):
    model = request.getfixturevalue(model)[0]
    with pytest.raises(ValueError, match=words):
        measure_quality(model, None, batches() if given is None else batches(given), **options)
