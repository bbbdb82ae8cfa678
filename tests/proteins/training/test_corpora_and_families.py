"""Training from a corpus, and on rows of relatives, of a corpus or by FASTA headers."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from performers.app.errors import Interrupted
from performers.proteins.corpus import Corpus
from performers.proteins.inputs.families import FamilyRows, ProteinFamilies
from performers.proteins.inputs.objectives import CausalCollator, MaskedCollator
from performers.proteins.inputs.tokenizer import encode_sequences
from performers.proteins.training.train import train_model
from tests.cli.commands import refusal, run
from tests.proteins.corpus.test_shards import write_corpus
from tests.proteins.runs import (
    flags,
    history,
    losses,
    make_model,
    proteins,
    same_weights,
    small_options,
    train,
)
from tests.proteins.training.test_resume import stop_at

SEQUENCES = proteins(24, longest=20)
FAMILIES = [f"f{index % 5}" for index in range(24)]
OPTIONS = {"max_length": 60, "steps": 6, "save_steps": 2, "dropout": 0.2}


@pytest.mark.parametrize("packed", [False, True])
def test_a_corpus_is_its_sequences_in_memory_and_resumes_in_an_epoch(tmp_path, packed):
    records = [(f"p{n}", sequence) for n, sequence in enumerate(proteins(60, longest=40))]
    splits = {"train": records, "validation": records[:8]}
    folder = write_corpus(tmp_path / "corpus", splits, shard_tokens=300)
    shards = Corpus(folder).split("train")
    in_memory = [sequence for _, sequence in records]
    run = partial(train, validation=in_memory[:8], packed=packed, save_steps=2)
    run(tmp_path / "memory", in_memory)
    run(tmp_path / "disk", shards)
    assert same_weights(tmp_path / "disk", tmp_path / "memory", atol=0)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", shards, progress=stop_at(3))
    run(tmp_path / "parts", shards, resume=True)
    assert same_weights(tmp_path / "parts", tmp_path / "memory", atol=0)
    assert "by itself" in refusal("train", folder, folder, "--output", tmp_path / "model")


@pytest.mark.parametrize(("objective", "hidden"), [("mlm", "one"), ("mlm", "all"), ("clm", "all")])
def test_a_run_that_was_stopped_continues_exactly(tmp_path, objective, hidden):
    options = small_options(**OPTIONS, objective=objective, families=hidden)
    run = partial(train_model, SEQUENCES, options=options, families=FAMILIES)
    assert run(tmp_path / "whole")["eval_tokens"] > 0
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", progress=stop_at(3))
    run(tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_families_belong_to_the_run(tmp_path):
    fasta = tmp_path / "a.fasta"

    def write(names):
        lines = zip(SEQUENCES, names, strict=True)
        fasta.write_text("".join(f">p{n} family={f}\n{s}\n" for n, (s, f) in enumerate(lines)))

    write(FAMILIES)
    arguments = ["train", fasta, *flags(**OPTIONS, families="all"), "--output", tmp_path / "model"]
    run(*arguments)
    assert json.loads((tmp_path / "model" / "training.json").read_text())["options"]["families"]
    write(FAMILIES[::-1])
    assert "not the same" in refusal(*arguments, "--resume")
    fasta.write_text(">p1\nMKTA\n")
    assert "names no family" in refusal(*arguments[:-1], tmp_path / "other")
    assert "--packed" in refusal(*arguments[:-1], tmp_path / "other", "--packed")


def test_a_corpus_has_its_families(tmp_path):
    records = [(f"p{n}", sequence) for n, sequence in enumerate(SEQUENCES)]
    splits = {"train": records[:20], "validation": records[20:]}
    folder = write_corpus(tmp_path / "corpus", splits, shard_tokens=100)
    clusters = zip(FAMILIES, records, strict=True)
    (folder / "clusters.tsv").write_text("".join(f"{f}\t{name}\n" for f, (name, _) in clusters))
    assert Corpus(folder).families("validation") == FAMILIES[20:]
    run("train", folder, *flags(**OPTIONS, families="one"), "--output", tmp_path / "disk")
    options = small_options(**OPTIONS, families="one")
    train_model(
        SEQUENCES[:20],
        tmp_path / "memory",
        options,
        validation=SEQUENCES[20:],
        families=FAMILIES[:20],
        validation_families=FAMILIES[20:],
    )
    assert same_weights(tmp_path / "disk", tmp_path / "memory")
    scores = [
        [entry["eval_loss"] for entry in history(tmp_path / name) if "eval_loss" in entry]
        for name in ("disk", "memory")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.parametrize("families", [None, "one"])
def test_proteins_of_large_families_are_read_more_often(tmp_path, families):
    """Of 24 proteins four are of a family of four, and all others alone."""
    names = ["f", *(f"f{index}" for index in range(1, 21)), "f", "f", "f"]
    options = small_options(**{**OPTIONS, "steps": 40}, families=families, family_power=1)
    run = partial(train_model, SEQUENCES, options=options, families=names)
    if families is None:
        options = replace(options, validation_fraction=0)
        read = []
        collate = MaskedCollator.__call__

        def reading(self, examples):
            read.extend(example["index"] for example in examples)
            return collate(self, examples)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MaskedCollator, "__call__", reading)
            run(tmp_path / "read", options=options)
        share = np.isin(read, [0, 21, 22, 23]).mean()
        assert share == pytest.approx(16 / 36, abs=0.05)
    run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", progress=stop_at(3))
    run(tmp_path / "parts", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_family_power_needs_families(tmp_path):
    fasta = tmp_path / "a.fasta"
    fasta.write_text("".join(f">p{n}\n{sequence}\n" for n, sequence in enumerate(SEQUENCES)))
    arguments = ["train", fasta, *flags(**OPTIONS, family_power=-1), "--output", tmp_path / "model"]
    assert "names no family" in refusal(*arguments)
    assert "cannot be combined with --packed" in refusal(*arguments, "--packed")
    lines = zip(SEQUENCES, FAMILIES, strict=True)
    fasta.write_text("".join(f">p{n} family={f}\n{s}\n" for n, (s, f) in enumerate(lines)))
    run(*arguments)
    with pytest.raises(ValueError, match=r"families: expected with .* or options.family_power"):
        train_model(SEQUENCES, tmp_path, small_options(family_power=1))


def test_families_go_with_the_option(tmp_path):
    with pytest.raises(ValueError, match="families: expected with options"):
        train_model(SEQUENCES, tmp_path, small_options(), families=FAMILIES)
    options = small_options(families="all")
    with pytest.raises(ValueError, match="families: expected with options"):
        train_model(SEQUENCES, tmp_path, options)
    with pytest.raises(ValueError, match="validation_families: expected"):
        train_model(SEQUENCES, tmp_path, options, families=FAMILIES, validation=SEQUENCES)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_protein_reads_its_relatives(objective):
    model, tokenizer = make_model(objective, max_length=100)
    collate = CausalCollator(tokenizer) if objective == "clm" else MaskedCollator(tokenizer, seed=1)
    logits = []
    for relative in ("MKTAYIAKQR", "MKTAYIAKQW"):
        tokens = encode_sequences(tokenizer, [relative, "MSTAYLAKHR"])
        rows = FamilyRows(ProteinFamilies(tokens, ["f", "f"]), max_length=100, hidden="one")
        batch = collate([rows[1]])
        with torch.no_grad():
            logits.append(model(**batch).logits[0, -12:])
    assert (logits[0] - logits[1]).abs().amax(-1).min() > 1e-6
