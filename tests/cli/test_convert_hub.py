"""``performers convert`` with models of the Hub and of sentence-transformers, and its cards."""

import copy
import hashlib
import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from performers.cli import convert_run
from performers.convert import load_performer
from performers.convert.distillation import pipeline
from performers.convert.distillation.pretrained import load_model
from performers.convert.distillation.results import BestState
from tests.benchmark.tiny_models import save_llama, words
from tests.cli.commands import refusal
from tests.cli.commands import run as run_command
from tests.convert.sentence_models import save_sentence_model

SMALL = [
    "--window", 4, "--num-features", 8, "--calibration", 4, "--test", 6, "--batch-size", 2,
    "--transfer-steps", 2, "--steps", 4, "--eval-steps", 2, "--no-speed",
]  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """A cache of the Hub of one's own, and no network; no figures."""
    monkeypatch.setattr(convert_run, "save_figure", lambda figure, path: path.touch())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text(words(3000, 1))
    return ["--data", tmp_path / "text.txt"]


def put_on_the_hub(folder, name, cache):
    """Lay a folder into a cache of the Hub as a download leaves it."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")


def test_a_sentence_model_of_the_hub_goes_in_and_one_comes_out(data, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    original, folder = save_sentence_model(tmp_path / "original"), tmp_path / "out"
    put_on_the_hub(original, "someone/tiny", tmp_path / "cache")
    run_command("convert", "someone/tiny", *data, "--output", folder, *SMALL, "--length", 60)
    for name in ("modules.json", "1_Pooling/config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((original / name).read_text())
    content = json.loads((folder / "conversion.json").read_text())
    assert content["model"]["kind"] == "encoder"
    assert content["options"]["loss"] == "embedding"
    assert content["options"]["model"] == "someone/tiny"
    weights = hashlib.sha256((original / "model.safetensors").read_bytes()).hexdigest()
    assert content["provenance"]["model"]["sha256"] == weights
    model = st.SentenceTransformer(str(folder))
    assert model.max_seq_length == 60
    assert model.tokenizer([words(57, 1)], return_tensors="pt")["input_ids"].shape == (1, 59)
    assert torch.tensor(model.encode([words(57, 1)])).isfinite().all()
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "someone/tiny"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "sentence-transformers"
    assert "# someone/tiny, with linear attention" in card.text
    assert "| converted |" in card.text
    assert "Licence: apache-2.0" in card.text
    put_on_the_hub(folder, "someone/linear", tmp_path / "cache")
    model = load_performer("someone/linear")
    again = load_performer(folder)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(ids).last_hidden_state, again(ids).last_hidden_state)


def test_a_transformer_in_a_folder_of_its_own(data, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    original = save_sentence_model(tmp_path / "original")
    inner = original / "0_Transformer"
    inner.mkdir()
    for path in list(original.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "README.md"):
            shutil.move(path, inner)
    modules = json.loads((original / "modules.json").read_text())
    modules[0]["path"] = inner.name
    (original / "modules.json").write_text(json.dumps(modules))
    untrained = [*SMALL, "--steps", 0, "--transfer-steps", 0, "--estimator", "positive"]
    untrained += ["--window", 64, "--length", 24]
    run_command("convert", original, *data, "--output", tmp_path / "out", *untrained)
    before, after = (st.SentenceTransformer(str(tmp_path / x)) for x in ("original", "out"))
    texts = [words(9, 1), words(20, 2)]
    expected = torch.tensor(before.encode(texts))
    torch.testing.assert_close(torch.tensor(after.encode(texts)), expected, atol=1e-5, rtol=1e-5)
    assert after.max_seq_length == before.max_seq_length
    weights = hashlib.sha256((inner / "model.safetensors").read_bytes()).hexdigest()
    content = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert content["provenance"]["model"] == {"path": str(inner), "sha256": weights}


def test_an_absent_name_offline_says_what_to_do(data, tmp_path):
    line = refusal("convert", "someone/absent", *data, "--output", tmp_path / "out", *SMALL)
    assert line.startswith("MODEL someone/absent is no folder")
    assert "HF_HUB_OFFLINE is set" in line
    assert "hf download someone/absent" in line
    with pytest.raises(FileNotFoundError, match="path someone/absent is no folder"):
        load_performer("someone/absent")
    # What cannot be a name is a path.
    line = refusal("convert", tmp_path / "absent", *data, "--output", tmp_path / "other", *SMALL)
    assert line.endswith("absent does not exist")


@pytest.mark.parametrize(
    ("harmful", "after"),
    [
        (
            [
                *["--loss", "hidden", "--learning-rate", 0.3, "--transfer-steps", 0],
                *["--steps", 8, "--eval-steps", 1],
            ],
            "after 6 steps of fine-tuning",
        ),
        (["--learning-rate", 10.0, "--transfer-steps", 0], "before the training"),
    ],
    ids=["better", "worse"],
)
def test_the_best_measured_state_is_saved(data, tmp_path, harmful, after):
    """Learning rates that harm, or bring another loss down than what is measured.

    The original's card cannot be read, and so states no licence.
    """
    model, folder = save_llama(tmp_path / "llama"), tmp_path / "out"
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    options = [*SMALL, "--length", 24, *harmful]
    out, _ = run_command("convert", model, *data, "--output", folder, *options)
    content = json.loads((folder / "conversion.json").read_text())
    history = [x for x in content["training"]["history"] if "perplexity" in x]
    rows = {row["model"]: row["perplexity"] for row in content["quality"]}
    best = min([rows["converted"], *(x["perplexity"] for x in history)])
    assert history[-1]["perplexity"] > best
    assert rows["converted, fine-tuned"] == pytest.approx(best, rel=1e-6)
    assert f"Saved: the best measured state by perplexity, {after}" in out
    # It is the one in the folder.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = pipeline.split_text(tokenizer, data[1], 24, calibration=4, test=6).test
    saved = pipeline.measure_quality(
        load_performer(folder), None, [pipeline.Collator()(texts)], tokenizer=tokenizer
    )
    assert saved.perplexity == pytest.approx(best, rel=1e-4)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None
    assert card.data.base_model is None
    assert "The original's card states no licence" in card.text
    assert "load_performer(FOLDER)" in card.text


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_state_with_adapters_is_kept_merged(tmp_path):
    peft = pytest.importorskip("peft")
    original = load_model(save_llama(tmp_path / "llama")).model
    student = copy.deepcopy(original)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(student, config)
    best = BestState(tmp_path / "training" / "best.safetensors")
    best.offer(student, {"perplexity": 3.0})
    merged = adapted.merge_and_unload()
    best.offer(original, {"perplexity": 4.0})
    assert BestState(best.file).score == -3.0
    changed = copy.deepcopy(original)
    changed.load_state_dict(load_file(best.file))
    ids = torch.arange(5, 25)[None]
    assert torch.equal(changed(ids).logits, merged(ids).logits)
    assert not torch.equal(changed(ids).logits, original(ids).logits)
