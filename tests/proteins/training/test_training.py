"""Training runs: what they write, what they learn, and what they refuse."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from performers.app.errors import UserError
from performers.features import FeatureMap
from performers.proteins.model_folder import load_model
from performers.proteins.scoring.evaluation import evaluate_model
from performers.proteins.training import train as training
from performers.proteins.training.train import train_model
from performers.training import arguments
from tests.proteins.runs import (
    history,
    losses,
    proteins,
    same_weights,
    small_options,
    train,
    weights,
)

FILES = {
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("manifest.json", "trainer_state.json", "training.json", "checkpoints"),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True, "objective": "clm", "attention": "favor-relu"},
        {"gradient_checkpointing": True, "packed": True, "objective": "clm"},
        {"position_embedding": "learned", "packed": True, "attention": "exact"},
        {"position_embedding": "sinusoidal", "packed": True, "across_sequences": True},
        {"attention": "identity", "validation_fraction": 0.0, "max_grad_norm": 0.0},
        {"estimator": "trigonometric", "accumulation": 3, "redraw_steps": 0, "warmup_steps": 0},
    ],
    ids=str,
)
def test_every_way_to_train_ends_with_a_model(tmp_path, options):
    result = train(tmp_path, **{"steps": 2, **options})
    assert {path.name for path in tmp_path.iterdir()} - {"generation_config.json"} == FILES
    model, tokenizer = load_model(tmp_path)
    assert model.config.is_decoder is (options.get("objective") == "clm")
    assert tokenizer.model_max_length == 40
    assert result["steps"] == 2
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["seconds"] > 0
    assert len(losses(tmp_path)) == 2
    assert all(2.0 < loss < 5.0 for loss in losses(tmp_path))
    assert ("eval_accuracy" in result) is (options.get("validation_fraction") != 0.0)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["options"] == small_options(**{"steps": 2, **options}).to_dict()
    assert (record["result"], record["processes"]) == (result, 1)
    data = record["data"]
    assert data["sequences"] + data["validation_sequences"] == len(proteins())
    assert data["residues"] <= sum(map(len, proteins()))


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_model_learns(tmp_path, objective):
    sequences = [letter * 20 for letter in "MKTW"]
    result = train(
        tmp_path,
        sequences,
        validation=sequences,
        objective=objective,
        steps=60,
        learning_rate=1e-2,
        dropout=0.0,
        save_steps=60,
        redraw_steps=25,
    )
    assert result["eval_accuracy"] > 0.9
    assert result["eval_baseline_accuracy"] < 0.35
    assert losses(tmp_path)[-1] < 0.5 * losses(tmp_path)[0]


def test_validations_and_progress(tmp_path):
    """The last validation is of the saved model; every step and every log entry is reported."""
    validation, seen = proteins(10, seed=1), []
    result = train(
        tmp_path,
        validation=validation,
        steps=5,
        eval_steps=2,
        progress=lambda *entry: seen.append(entry),
    )
    model, tokenizer = load_model(tmp_path)
    again = evaluate_model(model, tokenizer, validation, max_length=40, batch_tokens=200)
    assert result["eval_loss"] == pytest.approx(again["loss"], rel=1e-6)
    assert result["eval_tokens"] == again["tokens"]
    assert [entry["step"] for entry in history(tmp_path) if "eval_loss" in entry] == [2, 4, 5]
    assert [step for step, _, log in seen if not log] == [0, 1, 2, 3, 4, 5]
    assert {total for _, total, _ in seen} == {5}
    assert [step for step, _, log in seen if "loss" in log] == [1, 2, 3, 4, 5]
    assert [step for step, _, log in seen if "eval_accuracy" in log] == [2, 4, 5]


def test_the_seed_decides_and_watching_does_not(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    train(folders[0], eval_steps=1, save_steps=1)
    train(folders[1], eval_steps=6, save_steps=6)
    train(folders[2], seed=1)
    assert losses(folders[0]) == losses(folders[1])
    assert same_weights(*folders[:2])
    assert losses(folders[0])[0] != losses(folders[2])[0]


def test_accumulated_batches_are_one_batch(tmp_path):
    """A step of two batches of one row is a step of one batch of two rows, whatever their order."""
    options = {"sequences": ["MKTWA" * 4] * 8, "validation": [], "objective": "clm", "dropout": 0.0}
    train(tmp_path / "two", batch_tokens=22, max_length=22, accumulation=2, **options)
    train(tmp_path / "one", batch_tokens=44, max_length=22, **options)
    assert len(losses(tmp_path / "two")) == 6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert same_weights(tmp_path / "one", tmp_path / "two")


def test_gradient_checkpointing_changes_nothing(tmp_path):
    options = {"dropout": 0.1, "steps": 4}
    train(tmp_path / "kept", **options)
    train(tmp_path / "again", gradient_checkpointing=True, **options)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), abs=1e-5)


@pytest.mark.parametrize(("interval", "redrawn"), [(2, [2, 4]), (0, [])])
def test_features_are_redrawn_on_schedule_but_not_after_the_last_step(
    tmp_path, monkeypatch, interval, redrawn
):
    build, models = training.PerformerForMaskedLM, []
    monkeypatch.setattr(
        training,
        "PerformerForMaskedLM",
        lambda config: models.append(build(config)) or models[0],
    )
    seen = {}

    def watch(step, total, log):
        features = [module for module in models[0].modules() if isinstance(module, FeatureMap)]
        seen[step] = torch.stack([feature_map.weight.clone() for feature_map in features])

    train(tmp_path, redraw_steps=interval, progress=watch)
    assert [n for n in range(1, 7) if not torch.equal(seen[n - 1], seen[n])] == redrawn
    saved = [value for name, value in weights(tmp_path).items() if "feature_map" in name]
    assert torch.equal(torch.stack(saved), seen[6])


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0},
        {"learning_rate": 1e38, "warmup_steps": 0, "steps": 1},
    ],
    ids=str,
)
def test_a_run_that_diverges_ends_in_one_line_and_saves_no_model(tmp_path, options):
    # The optimizers of older releases of torch refuse such a step themselves.
    message = r"(not finite after step|the loss became (nan|inf)).*--learning-rate|without overflow"
    with pytest.raises((UserError, RuntimeError), match=message):
        train(tmp_path, **{"save_steps": 1, **options})
    assert {path.name for path in tmp_path.iterdir()} <= {"training.json", "checkpoints"}
    with pytest.raises(UserError, match="training has not ended"):
        load_model(tmp_path)


def test_checkpoints_from_before_a_diverged_step_are_usable(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole)
    step = training._ProteinTrainer.compute_loss
    calls = []

    def fail_at_the_fifth(self, *args, **kwargs):
        calls.append(None)
        return step(self, *args, **kwargs) * (float("nan") if len(calls) == 5 else 1.0)

    with monkeypatch.context() as patched:
        patched.setattr(training._ProteinTrainer, "compute_loss", fail_at_the_fifth)
        with pytest.raises(UserError, match="the loss became nan at step 5"):
            train(broken)
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["checkpoint-3"]
    train(broken, resume=True)
    assert losses(broken) == pytest.approx(losses(whole), abs=1e-5)
    assert same_weights(whole, broken)


def test_packing_across_sequences_is_another_model(tmp_path):
    options = {"packed": True, "dropout": 0.0, "steps": 3, "position_embedding": "learned"}
    train(tmp_path / "within", **options)
    train(tmp_path / "across", across_sequences=True, **options)
    assert losses(tmp_path / "within") != losses(tmp_path / "across")


@pytest.mark.parametrize(
    ("sequences", "options"),
    [
        (["MKTW"], {}),
        (["MK", "A", "X"], {"objective": "clm", "packed": True}),
        (["M" * 500], {"packed": True}),
        (None, {"max_length": 3, "batch_tokens": 9, "position_embedding": "learned"}),
    ],
)
def test_little_data_is_enough(tmp_path, sequences, options):
    assert train(tmp_path, sequences, steps=2, **options)["steps"] == 2
    load_model(tmp_path)


def test_what_cannot_be_trained_leaves_the_folder_empty(tmp_path):
    with pytest.raises(UserError, match="no two residues in a row to learn from"):
        train(tmp_path, ["M", "K"])
    assert not list(tmp_path.iterdir())


def test_the_estimate_comes_before_the_first_step_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("performers.training.callbacks._FEWEST_BATCHES", 1)
    clock = SimpleNamespace(late=0.0, monotonic=lambda: time.monotonic() + clock.late)
    clock.perf_counter = time.perf_counter
    monkeypatch.setattr("performers.training.callbacks.time", clock)
    options, said = small_options(steps=2), []

    def announce(text):
        clock.late = 1000.0
        said.append(text)

    train_model(proteins(), tmp_path / "without", options)
    watch = {"announce": announce, "progress": lambda *step: said.append(step)}
    result = train_model(proteins(), tmp_path / "with", options, **watch)
    assert 0 < result["seconds"] < 1000, "the estimate is no training"
    assert re.match(r"about \d+ s for 2 steps, at [\d.e-]+ s a batch; ", said[0])
    assert not isinstance(said[1], str)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_trackers_log_what_the_run_logs(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, log_dir):
            written.append(Path(log_dir))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def __getattr__(self, name):
            return lambda *_: None

    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)
    board = arguments.TensorBoardCallback
    monkeypatch.setattr(arguments, "TensorBoardCallback", lambda: board.__new__(board))
    monkeypatch.setattr(board, "_SummaryWriter", Writer, raising=False)
    monkeypatch.setattr(board, "tb_writer", None, raising=False)
    train_model(proteins(), tmp_path, small_options(report_to=("tensorboard",), steps=1))
    assert written[0] == tmp_path / "tensorboard"
    assert ("train/loss", 1) in written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"report_to": ("wandb",)}, "--report-to wandb needs a package: pip install wandb"),
        ({"device": "gpu"}, "device gpu is not available"),
        ({"device": "cpu:0"}, "--device cpu:0: training takes a kind of device"),
    ],
)
def test_what_the_machine_lacks_is_refused(changes, words, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=words):
        train_model(proteins(), tmp_path, small_options(**changes))
    assert not any(tmp_path.iterdir())
