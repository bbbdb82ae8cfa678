"""Accuracy studies of tiny pretrained models, small enough for a test."""

from performers.benchmark.measure import Results
from studies.accuracy import pretrained
from studies.accuracy.options import PretrainedOptions
from tests.benchmark.tiny_models import residues, save_bert, save_llama, words

TINY = {
    "length": 32,
    "window": 8,
    "sinks": 2,
    "keys": 4,
    "num_features": 16,
    "feature_counts": (8, 16),
    "repeats": 1,
    "min_time": 0.0,
    "backend": "torch",
}


def pretrained_options(folder, family, **changes):
    """Options for a model of a family, saved with its texts under a folder."""
    text, calibration = folder / "text.txt", folder / "calibration.txt"
    if family == "bert":
        model = save_bert(folder)
        text.write_text(f">one\n{residues(200, 1)}\n")
        calibration.write_text(f">one\n{residues(200, 3)}\n")
    else:
        model = save_llama(folder / "llama")
        text.write_text(words(200, 1))
        calibration.write_text(words(200, 3))
    options = {"model": str(model), "text": str(text), "calibration": str(calibration)}
    return PretrainedOptions(**(options | TINY | changes))


def compare_few(monkeypatch, step=6):
    """Let heads and models be compared under every so many settings alone."""
    for name in ("head_approximations", "model_approximations"):
        every = getattr(pretrained, name)
        monkeypatch.setattr(pretrained, name, lambda *x, every=every: every(*x)[::step])


def measure(run, model, earlier=()):
    """Results of ``run_heads`` or ``run_models``."""
    results = Results.empty("accuracy", model.options)
    results.rows = list(earlier)
    run(model, results, lambda done, total: None)
    return results
