"""Training on texts: exact resume with a carried state, forgetting, redraws, other draws."""

import json

import pytest
import torch

from performers.app.errors import Interrupted, UserError
from performers.models import PerformerForCausalLM
from performers.streams.evaluation import evaluate_texts
from performers.streams.text import read_bytes
from performers.streams.training import TextTrainer
from tests.proteins.runs import losses, same_weights
from tests.proteins.training.test_resume import stop_at
from tests.streams.texts import train, write_texts

KINDS = {
    "carried window": {"carry_state": True, "window": 3},
    "carried relu": {"carry_state": True, "attention": "favor-relu", "accumulation": 2},
    "memory": {"carry_state": True, "attention": "exact", "memory": 10},
    "shuffled": {},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(texts, folder, steps=1)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_as_one_that_was_not(kind, texts, tmp_path):
    """Stopped within texts, right after a redraw (3) and between redraws."""
    options = KINDS[kind]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(texts, whole, **options)
    for step in (2, 4):
        with pytest.raises(Interrupted):
            train(texts, parts, resume=step > 2, progress=stop_at(step), **options)
    train(texts, parts, resume=True, **options)
    assert losses(parts) == losses(whole)
    assert same_weights(parts, whole, atol=0)


@pytest.mark.parametrize(
    "attention", [{}, {"window": 3}, {"attention": "exact", "memory": 200}], ids=str
)
def test_the_past_counts_and_is_that_of_the_row(attention, texts, tmp_path, monkeypatch):
    """The loss of each batch is that of the texts' tokens so far, run at once without a cache."""
    seen = []
    compute = TextTrainer.compute_loss

    def spy(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model.eval()
        seen.append((inputs["input_ids"], inputs["begins"], inputs["shift_labels"]))
        loss, outputs = compute(self, model, inputs, True, num_items_in_batch)
        starts = [
            max(n for n, (_, begins, _) in enumerate(seen) if begins[row]) for row in range(3)
        ]
        for row, start in enumerate(starts):
            so_far = torch.cat([ids[row] for ids, _, _ in seen[start:]])
            alone = model(so_far[None], use_cache=False).logits[0, -16:]
            kept = seen[-1][2][row] != -100
            assert torch.allclose(outputs.logits[row][kept], alone[kept], atol=1e-5)
        model.train()
        return loss

    monkeypatch.setattr(TextTrainer, "compute_loss", spy)
    # The weights stay as they are, so that the past is that of the present model.
    train(texts, tmp_path, carry_state=True, learning_rate=0.0, redraw_steps=0, **attention)
    assert sum(len(begins) - int(begins.sum()) for _, begins, _ in seen) > 8


def test_a_redraw_makes_all_rows_forget(texts, tmp_path, monkeypatch):
    lengths = []
    compute = TextTrainer.compute_loss

    def spy(self, *args, **kwargs):
        past = self._present_past()
        lengths.append(0 if past is None else past.get_seq_length())
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(TextTrainer, "compute_loss", spy)
    long = write_texts(tmp_path / "long", (900, 900, 900, 900))
    train(long, tmp_path / "model", carry_state=True)
    assert lengths == [0, 16, 32, 0, 16, 32, 0, 16], "redraws after steps 3 and 6"


def oracle(model, read, context=10**6):
    """Places of all tokens in their texts, and their nats, by contexts that are read at once."""
    for document, count in enumerate(read.lengths.tolist()):
        for begun in range(0, count - 1, context):
            ids = torch.from_numpy(read.read(document, begun, begun + context + 1))
            logits = model(ids[None, :-1], use_cache=False).logits[0].detach()
            nats = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            yield from enumerate(nats.tolist(), start=begun)


def test_a_saved_model_loads_and_evaluates(texts, tmp_path):
    result = train(texts, tmp_path, carry_state=True, validation_fraction=0.3)
    model = PerformerForCausalLM.from_pretrained(tmp_path)
    held = json.loads((tmp_path / "training.json").read_text())["data"]
    assert held["validation_texts"] >= 1
    assert result["eval_bits_per_byte"] == pytest.approx(result["eval_loss"] / 0.6931471805599453)
    read = read_bytes(sorted(texts.iterdir()), print)
    found = evaluate_texts(model, read, length=16, carry=True, rows=3)
    assert found["tokens"] == sum(n - 1 for n in read.lengths)
    nats = sum(value for _, value in oracle(model, read))
    assert found["loss"] == pytest.approx(nats / found["tokens"], abs=1e-5)


@pytest.mark.parametrize(
    ("length", "context", "carry", "rows"),
    [(32, None, False, 1), (8, 32, True, 4), (8, 32, False, 4)],
)
def test_bits_by_place_are_those_of_the_oracle(length, context, carry, rows, texts, trained):
    model = PerformerForCausalLM.from_pretrained(trained)
    read = read_bytes(sorted(texts.iterdir()), print)
    found = evaluate_texts(model, read, length=length, context=context, carry=carry, rows=rows)
    sums = torch.zeros(16, 2, dtype=torch.float64)
    for place, value in oracle(model, read, 32 if carry else length):
        sums[place % 32 // 2] += torch.tensor([value, 1.0])
    bits = (sums[:, 0] / sums[:, 1] / 0.6931471805599453).tolist()
    assert [place["bits_per_byte"] for place in found["places"]] == pytest.approx(bits, abs=1e-4)
    assert [place["start"] for place in found["places"]] == list(range(0, 32, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "mlm"}, "texts are trained on with --objective clm"),
        ({"packed": True}, r"--packed is for sequences"),
        ({"families": "all"}, r"--families is for sequences"),
        ({"family_power": -1}, r"--family-power is for sequences"),
        ({"fsdp": True}, "--fsdp and --sequence-parallel are for sequences"),
    ],
)
def test_options_of_sequences_are_refused(changes, words, texts, tmp_path):
    with pytest.raises(UserError, match=words):
        train(texts, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_run_begins_with_the_weights_of_another(texts, trained, tmp_path):
    shape = {"start": trained, "max_length": 8, "learning_rate": 0.0, "redraw_steps": 0}
    train(texts, tmp_path / "next", **shape, steps=2)
    assert same_weights(tmp_path / "next", trained, atol=0)
    with pytest.raises(UserError, match="the data are not the same"):
        train(texts, tmp_path / "next", **{**shape, "start": None}, steps=2, resume=True)
    # Other texts are another run.
    other = write_texts(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="the data are not the same"):
        train(other, tmp_path / "next", **shape, steps=2, resume=True)


def test_a_validation_of_nothing_is_announced(tmp_path):
    even = write_texts(tmp_path / "even", (100, 100, 100, 100))
    lines = []
    for number, share in enumerate((0.2, 0.3, 0.0)):
        train(
            even, tmp_path / f"{number}", steps=1, validation_fraction=share, announce=lines.append
        )
    assert len(lines) == 1
    assert "--validation-fraction 0.2 holds out no text" in lines[0]


def test_validation_reads_at_most_so_many_tokens_of_a_long_text(texts, trained):
    model = PerformerForCausalLM.from_pretrained(trained)
    read = read_bytes(sorted(texts.iterdir()), print)
    limited = {"length": 16, "carry": True, "tokens_at_most": 40}
    assert evaluate_texts(model, read, **limited)["tokens"] == 40
    assert evaluate_texts(model, read, length=16, tokens_at_most=40)["tokens"] <= 48


@pytest.mark.slow
def test_long_rows_resume_exactly(tmp_path):
    """At 8,192 tokens, with a state from segment to segment."""
    long = write_texts(tmp_path / "long", (60_000, 50_000))
    shape = {"max_length": 8192, "batch_tokens": 8192, "carry_state": True, "steps": 4}
    train(long, tmp_path / "whole", **shape)
    with pytest.raises(Interrupted):
        train(long, tmp_path / "parts", progress=stop_at(2), **shape)
    train(long, tmp_path / "parts", resume=True, **shape)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole", atol=0)
