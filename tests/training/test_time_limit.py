"""A time limit ends a run, with the learning rate at zero, over all its parts together."""

import json
import signal
from functools import partial
from types import SimpleNamespace

import pytest

from performers.app.errors import Interrupted
from performers.training import callbacks
from performers.training.callbacks import TimeLimitCallback
from tests.proteins import runs
from tests.proteins.runs import history, same_weights


@pytest.fixture
def ticking(monkeypatch):
    """Each step takes 10 s of processor time, whatever happens between the steps."""
    clock = SimpleNamespace(now=0.0)

    def process_time():
        clock.now += 10.0
        return clock.now

    monkeypatch.setattr(
        callbacks, "time", SimpleNamespace(monotonic=lambda: 0.0, process_time=process_time)
    )


train = partial(runs.train, steps=100, save_steps=2, warmup_steps=0)


def rates(folder):
    return [entry["learning_rate"] for entry in history(folder) if "loss" in entry]


def test_a_run_ends_at_its_limit_and_the_rate_falls_with_the_time(tmp_path, ticking):
    result = train(tmp_path, time_limit=45.0)
    assert (result["steps"], result["processor_seconds"]) == (5, 50.0)
    # The rate of a step is set within the one before it, whose time is not yet counted.
    left = [min(1 - step / 100, 1 - 10 * max(0, step - 1) / 45) for step in range(5)]
    assert rates(tmp_path) == pytest.approx([1e-3 * share for share in left])
    assert (tmp_path / "checkpoints" / "checkpoint-5").is_dir()
    assert (tmp_path / "model.safetensors").is_file()


def test_progress_is_of_the_steps_that_there_will_be(tmp_path, ticking):
    shown = []
    train(tmp_path, time_limit=45.0, progress=lambda *report: shown.append(report[:2]))
    assert sorted(set(shown)) == [(0, 100), (1, 4), (2, 4), (3, 4), (4, 4), (5, 5)]


def test_each_tenth_of_the_limit_is_saved_and_validated(tmp_path, ticking):
    """Steps alone would save and validate after 100 of 1,000."""
    train(tmp_path, time_limit=150.0, steps=1000, save_steps=None, eval_steps=None)
    # Steps of 10 s, tenths of 15 s.
    validated = [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]
    assert [x["step"] for x in history(tmp_path) if "eval_loss" in x] == validated
    saved = {x.name for x in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"checkpoint-14", "checkpoint-15"}


def test_a_run_that_ends_before_its_limit_is_as_without(tmp_path, ticking):
    train(tmp_path / "limited", steps=4, time_limit=1e9)
    train(tmp_path / "free", steps=4)
    assert rates(tmp_path / "limited") == pytest.approx(rates(tmp_path / "free"), rel=1e-6)
    assert same_weights(tmp_path / "limited", tmp_path / "free")


def test_time_is_kept_over_a_resume(tmp_path, ticking):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, time_limit=65.0)

    def stop(step, total, log):
        if step == 3 and not log:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(parts, time_limit=65.0, progress=stop)
    # The signal comes when the callbacks of step 3 have run.
    assert TimeLimitCallback.seconds_at(parts / "checkpoints" / "checkpoint-4") == 40.0
    result = train(parts, time_limit=65.0, resume=True)
    assert (result["steps"], result["processor_seconds"]) == (7, 70.0)
    assert rates(parts) == rates(whole)
    assert same_weights(parts, whole)


def test_a_run_whose_time_is_spent_takes_no_further_step(tmp_path, ticking):
    first = train(tmp_path, time_limit=25.0)
    (tmp_path / "config.json").unlink()
    again = train(tmp_path, time_limit=25.0, resume=True)
    assert again == first
    assert (tmp_path / "config.json").is_file()
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["result"]["processor_seconds"] == 30.0
