"""Commands that are interrupted, or whose machine lacks something."""

import pytest

from tests.cli.commands import refusal, run


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("train {fasta} --output {new}", "training.train.train_model"),
        ("train {fasta} --output {new}", "inputs.fasta.read_fasta"),
        ("evaluate {model} {fasta}", "scoring.evaluation.evaluate_model"),
        ("evaluate {model} {fasta}", "model_folder.load_model"),
        ("embed {model} {fasta} --output {new}.npz", "scoring.embedding.embed_sequences"),
        ("generate {model}", "scoring.generation.generate_sequences"),
        ("report {model} {fasta} --output {new}", "report.model_report.report_on_model"),
    ],
)
def test_ctrl_c_anywhere_exits_with_130(command, function, fasta, causal, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"performers.proteins.{function}", interrupt)
    arguments = command.format(fasta=fasta, model=causal, new=tmp_path / "new").split()
    assert refusal(*arguments, code=130) == "interrupted"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/data/x"), "/data/x: No space left on device"),
        (MemoryError(), "out of memory; lower --batch-tokens"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        (ImportError("No module named 'pyarrow'"), "pip install 'performers[proteins]'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_machine_lacks_is_one_line(error, words, masked, fasta, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("performers.proteins.scoring.embedding.write_embeddings", fail)
    output = tmp_path / "x.npz"
    _, lines = run("embed", masked, fasta, "--output", output, code=2)
    assert words in lines[-1]
    assert not output.exists()
