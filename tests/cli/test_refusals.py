"""Command lines that cannot be used: one line that says why, and nothing is written."""

import gzip
import shutil

import pytest

from performers.proteins.embedded import PRETRAINED
from performers.proteins.inputs.fasta import write_fasta
from performers.training.options import TrainingOptions
from tests.cli.commands import refusal
from tests.proteins.probe.probe_data import motif_records
from tests.proteins.runs import flags, make_model_folder, write_sequences

# All that is refused in FASTA files is tested where they are read.
BAD_FASTA = {
    "missing": (None, ": no such file; check the path"),
    "directory": ("directory", ": this is a directory"),
    "truncated-gzip": (gzip.compress(b">a\nMKTLLW\n" * 200)[:-12], "the gzip data end too early"),
    "illegal-letter": (b">a\nMKT\n>b\nMKT\nM1T\n", ":5: illegal letter '1'"),
}


@pytest.fixture(scope="session")
def places(tmp_path_factory, fasta, masked, causal):
    """Paths that command lines name, by their names in them."""
    here = tmp_path_factory.mktemp("places")
    for name in ("full", "empty", "begun/checkpoints", "corpus"):
        (here / name).mkdir(parents=True)
    for name in ("file", "full/x"):
        (here / name).write_text("kept")
    (here / "corpus" / "manifest.json").write_text("{}")
    for name, (content, _) in BAD_FASTA.items():
        if content == "directory":
            (here / f"{name}.fasta").mkdir()
        elif content is not None:
            (here / f"{name}.fasta").write_bytes(content)
    shutil.copytree(causal, here / "sized")
    (here / "sized" / "model.safetensors").write_bytes(b"nothing of the kind")
    make_model_folder(here / "learned", "clm", position_embedding="learned", max_length=20)
    write_sequences(here / "long.fasta", ["M" * 50])
    write_fasta(here / "motifs.fasta", motif_records())
    (here / "clusters.tsv").write_text("".join(f"c\t{r.name}\n" for r in motif_records()))
    return {"here": here, "data": fasta.parent, "fasta": fasta, "masked": masked, "causal": causal}


def assert_refused(command, words, places):
    before = sorted(places["here"].rglob("*"))
    line = refusal(*command.format(**places).split())
    assert all(part in line for part in words.format(**places).split(" ... ")), line
    assert sorted(places["here"].rglob("*")) == before
    return line


FLAGS = " ".join(flags())
TRAIN = f"train {{fasta}} {FLAGS} --output {{here}}/new"
PROBE = "probe {masked} {here}/motifs.fasta --output {here}/new"
EVALUATE = "evaluate {masked} {fasta}"


@pytest.mark.parametrize("name", BAD_FASTA)
@pytest.mark.parametrize(
    "command",
    [
        "evaluate {masked} BAD --json",
        "embed {masked} BAD --output {here}/x.npz",
        f"train BAD --output {{here}}/new {FLAGS}",
        f"{TRAIN} --validation BAD",
        "report {masked} BAD --output {here}/new",
    ],
)
def test_fasta_files(command, name, places):
    path = f"{places['here']}/{name}.fasta"
    line = assert_refused(command.replace("BAD", path), BAD_FASTA[name][1], places)
    assert line.startswith(path)
    assert "; " in line, "it ends with what to do"


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        ("evaluate {here}/BAD {fasta}", "missing", "no such file or folder"),
        ("evaluate {here}/BAD {fasta}", "empty", "it has no config.json"),
        ("generate {here}/BAD", "missing", "is not a model folder"),
        *[
            (command, "sized", "model.safetensors has 19 bytes, expected")
            for command in (
                "evaluate {here}/BAD {fasta}",
                "embed {here}/BAD {fasta} --output {here}/x.npz",
                "generate {here}/BAD",
                "report {here}/BAD {fasta} --output {here}/new",
            )
        ],
    ],
)
def test_model_folders(command, name, words, places):
    """All that is refused in folders is tested where they are loaded."""
    line = assert_refused(command.replace("BAD", name), words, places)
    assert line.startswith(f"{places['here']}/{name}")


@pytest.mark.parametrize(
    "command",
    [
        TRAIN.removesuffix(" --output {here}/new"),
        "report {masked} {fasta}",
        "demo",
        "convert {causal} --data {fasta}",
    ],
)
def test_output_folders(command, places):
    resume = "" if command.startswith("report") else ", or --resume to continue the run in it"
    refused = f"--output {{here}}/full is not empty; give another folder{resume}"
    line = assert_refused(f"{command} --output {{here}}/full", refused, places)
    assert line == refused.format(**places)


@pytest.mark.parametrize(
    ("command", "suffix"), [("embed {masked} {fasta}", ".npz"), ("generate {causal}", ".fasta")]
)
def test_output_files(command, suffix, places):
    """All that is refused in files and folders is tested where they are prepared."""
    for place, words in (
        (f"{{here}}/file/x{suffix}", "{here}/file is not a folder"),
        ("{here}/x.txt", f"x.txt must end with  ... {suffix}"),
    ):
        assert_refused(f"{command} --output {place}", words, places)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fly", "No such command 'fly'; see "),
        ("data brew", "'brew'"),
        # The model, and what comes after it.
        ("evaluate {masked} {fasta} {here}/none.fasta", "none.fasta: no such file"),
        ("evaluate {masked}", "give at least one FASTA file after the model"),
        (f"evaluate {PRETRAINED}", "give at least one FASTA file after the model"),
        ("evaluate {here}/modle {fasta}", f"modle: no such file or folder ... {PRETRAINED}"),
        ("evaluate {here}/begun {fasta}", "finish it with performers train --resume"),
        *[
            (f"evaluate {{fasta}} {model}", f"{model} is a model, and comes before the FASTA files")
            for model in ("{masked}", PRETRAINED)
        ],
        *[
            (f"{command} --output {{here}}/new", "{data} is a folder without a model: it has no")
            for command in ("report {data} {fasta}", "probe {data}")
        ],
        (f"generate {PRETRAINED}", "the model predicts masked residues and cannot generate"),
        ("generate {masked}", "--objective clm"),
        ("generate {here}/learned", "cannot read 512"),
        ("evaluate {here}/learned {here}/long.fasta --max-length 64", "cannot read 52"),
        ("embed {here}/learned {here}/long.fasta --output {here}/x.npz", "cannot read 52"),
        (
            f"report {{causal}} {{fasta}} --compare {PRETRAINED} --output {{here}}/empty "
            "--protein nobody",
            "--protein 'nobody' is not in the FASTA files; the first are p0, p1",
        ),
        # Options; the other ranges are tested with their dataclasses.
        *[
            (f"{EVALUATE} --mask-probability {value}", "--mask-probability must be above 0 and at")
            for value in ("1.5", "nan")
        ],
        ("generate {causal} --output {here}/x.fasta --prompt M1", "--prompt has letters that are"),
        (
            "embed {masked} {fasta} --output {here}/x.npz --pooling max",
            "must be one of mean, mean-sd",
        ),
        ("demo --output {here}/new --steps 0", "--steps must be at least 1"),
        *[
            (f"{TRAIN} {option}", option.split()[0])
            for option in ("--positions none", "--steps many", "--across-sequences")
        ],
        (
            "train {here}/none.fasta --output {here}/new --layers 1000000000",
            "a model of  ... and this machine has",
        ),
        *[
            (
                f"train {data} --validation-fraction {TrainingOptions().validation_fraction} "
                "--output {here}/new",
                f"--validation-fraction holds out nothing beside {beside}",
            )
            for data, beside in (
                ("{here}/corpus", "the corpus, which has a validation split"),
                ("{fasta} --validation {fasta}", "--validation; leave it out"),
            )
        ],
        *[
            (f"{PROBE} {option}", words)
            for option, words in (
                ("--split family", "--split must be one of groups, random"),
                ("--features embeddings,size", "'size'"),
                ("--labels none.tsv", "none.tsv does not exist"),
                ("--groups none.tsv", "none.tsv does not exist"),
                ("--split random --per-group 1", "--per-group has no use with --split random"),
                ("--split random --groups {here}/clusters.tsv", "--groups has no use with --split"),
            )
        ],
        (
            f"generate x --top-k {-(2**63) - 1}",
            f"--top-k must be a 64-bit integer, got {-(2**63) - 1}",
        ),
        (
            f"benchmark attention --output x --lengths 128,{2**63}",
            f"--lengths must be a 64-bit integer, got {2**63}",
        ),
        (
            "benchmark attention --output x --threads 1000000000000",
            "--threads must be at least 1 and at most 1024, got 1000000000000",
        ),
    ],
)
def test_arguments(command, words, places):
    assert_refused(command, words, places)
