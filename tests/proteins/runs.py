"""What tests of training, of trained models and of the commands share: small data, small models."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import performers
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.models.manifest import save_model_folder
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, build_protein_tokenizer
from performers.proteins.training.train import train_model
from performers.training.options import TrainingOptions

# The package that the tests import, installed or not: in processes it must be the same one.
SOURCE = Path(performers.__file__).resolve().parents[1]

SMALL = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "max_length": 40,
    "batch_tokens": 200,
    "steps": 6,
    "redraw_steps": 2,
    "save_steps": 3,
    "log_steps": 1,
}


def proteins(count=30, shortest=5, longest=60, seed=0):
    """Sequences with something to learn: each has a favourite residue."""
    source = random.Random(seed)
    made = []
    for _ in range(count):
        weights = [1.0] * 20
        weights[source.randrange(20)] = 20.0
        made.append(
            "".join(source.choices(AMINO_ACIDS, weights, k=source.randint(shortest, longest)))
        )
    return made


def write_sequences(path, sequences):
    path.write_text("".join(f">p{n}\n{letters}\n" for n, letters in enumerate(sequences)))
    return path


def small_options(**changes):
    return TrainingOptions(**{**SMALL, **changes})


def train(folder, sequences=None, *, families=None, validation=None, **options):
    """`train_model` with small options; `resume` and `progress` are among them."""
    run = {name: options.pop(name) for name in ("resume", "progress") if name in options}
    given = proteins() if sequences is None else sequences
    return train_model(
        given, folder, small_options(**options), validation=validation, families=families, **run
    )


def flags(**changes):
    """The same as command-line arguments."""
    renamed = {"num_layers": "layers", "num_heads": "heads"}
    arguments = []
    for name, value in {**SMALL, **changes}.items():
        option = "--" + renamed.get(name, name).replace("_", "-")
        arguments += [option] if value is True else [option, str(value)]
    return arguments


def make_model(objective="mlm", *, max_length=40, **changes):
    """An untrained model whose predictions differ from residue to residue, and its tokenizer."""
    torch.manual_seed(5)
    tokenizer = build_protein_tokenizer(max_length, closed=objective == "mlm")
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.3,
        "max_position_embeddings": max_length,
        "is_decoder": objective == "clm",
    }
    config = PerformerConfig(**{**settings, **changes})
    model_class = PerformerForCausalLM if objective == "clm" else PerformerForMaskedLM
    return model_class(config).eval(), tokenizer


def log_probabilities(model, tokens, positions=None):
    """Those that a model gives at each place of a row, alone, in float64; ``(L, vocabulary)``."""
    tokens = torch.as_tensor(tokens).long()[None]
    if positions is not None:
        positions = torch.as_tensor(positions)[None]
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        logits = model(tokens, position_ids=positions, attention_mask=mask).logits
    return logits[0].double().log_softmax(-1)


def make_model_folder(folder, objective="mlm", **changes):
    folder.mkdir(parents=True)
    save_model_folder(folder, *make_model(objective, **changes))
    return folder


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def losses(folder):
    """The logged training losses, in order of the steps."""
    logged = {entry["step"]: entry["loss"] for entry in history(folder) if "loss" in entry}
    return [logged[step] for step in sorted(logged)]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_weights(first, second, *, atol=1e-6):
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[name], theirs[name], rtol=0, atol=atol) for name in ours)


def start(*arguments, **environment):
    """Start a Python process that finds the library, in its own process group."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE), **environment},
    )


def launcher(processes):
    """Arguments before a program that so many processes of torchrun run, or one."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return several if processes > 1 else []


def finish(process, seconds=120):
    """Wait for it; returns exit code, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, out, err
