"""Command lines that cannot be used: one line that says why, and nothing is written."""

import gzip
import itertools
import shutil

import pytest

from performers.proteins.embedded import PRETRAINED
from performers.proteins.inputs.fasta import write_fasta
from performers.training.options import TrainingOptions
from tests.cli.commands import refusal
from tests.proteins.probe.probe_data import motif_records
from tests.proteins.runs import flags, make_model_folder, write_sequences

WHOLE = gzip.compress(b">a\n" + b"MKTLLW" * 200 + b"\n", mtime=0)
BAD_FASTA = {
    "missing": (None, ": no such file; check the path"),
    "empty": (b"", ": the file is empty"),
    "blank": (b"\n\n", ": the file is empty"),
    "directory": ("directory", ": this is a directory"),
    "text": (b"MKTLLV\n", ":1: not FASTA: the first line must begin with '>'"),
    "binary": (b">a\nMK\x00\xff\xfe\x01\n", ":2: binary data"),
    "truncated-gzip": (WHOLE[:-12], "the gzip data end too early"),
    "corrupt-gzip": (WHOLE[:20] + b"\x00" * 8 + WHOLE[28:], "the gzip data are corrupt"),
    "illegal-letter": (b">a\nMKT\n>b\nMKT\nM1T\n", ":5: illegal letter '1'"),
    "gap": (b">a\nMK-T\n", ":2: illegal letter '-' in the record 'a'; remove the gaps"),
    "stop-inside": (b">a\nMK*T\n", ":2: illegal letter '*'"),
    "zero-length": (b">a\nMKT\n>b\n>c\nMKT\n", ":3: no residues in the record 'b'"),
    "no-name": (b">\nMKT\n", ":1: the header has no name"),
    "utf-16": (">a\nMKT\n".encode("utf-16"), ": this is UTF-16 text"),
}
# What is damaged in the copy of a model, and the words for it.
BAD_MODELS = {
    "missing": "no such file or folder",
    "empty": "it has no config.json",
    "sized": "model.safetensors has 19 bytes, expected",
    "unloadable": "cannot be loaded as a model",
    "nojson": "cannot be read as JSON",
    "bert": "holds a model of type 'bert'",
    "bare": "has no tokenizer.json",
}


@pytest.fixture(scope="session")
def places(tmp_path_factory, fasta, masked, causal):
    """Paths that command lines name, by their names in them."""
    here = tmp_path_factory.mktemp("places")
    for name in ("full", "folder.npz", "folder.fasta", "empty", "begun/checkpoints", "corpus"):
        (here / name).mkdir(parents=True)
    for name in ("file", "full/x"):
        (here / name).write_text("kept")
    (here / "corpus" / "manifest.json").write_text("{}")
    for name, (content, _) in BAD_FASTA.items():
        if content == "directory":
            (here / f"{name}.fasta").mkdir()
        elif content is not None:
            (here / f"{name}.fasta").write_bytes(content)
    for name in ("sized", "unloadable", "nojson", "bert", "bare"):
        shutil.copytree(causal, here / name)
    for name in ("sized", "unloadable"):
        (here / name / "model.safetensors").write_bytes(b"nothing of the kind")
    for name in ("unloadable", "nojson", "bert"):
        (here / name / "manifest.json").unlink()
    (here / "nojson" / "config.json").write_text("{")
    (here / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (here / "bare" / "tokenizer.json").unlink()
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


# Files read at once, and in parts.
READERS = ("evaluate {masked} BAD --json", "embed {masked} BAD --output {here}/x.npz")
OTHER_READERS = (
    f"train BAD --output {{here}}/new {FLAGS}",
    f"{TRAIN} --validation BAD",
    "report {masked} BAD --output {here}/new",
)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *itertools.product(READERS, BAD_FASTA),
        *itertools.product(OTHER_READERS, ("missing", "illegal-letter")),
    ],
    ids=lambda text: text.split(" -")[0],
)
def test_fasta_files(command, name, places):
    path = f"{places['here']}/{name}.fasta"
    line = assert_refused(command.replace("BAD", path), BAD_FASTA[name][1], places)
    assert line.startswith(path)
    assert "; " in line, "it ends with what to do"


@pytest.mark.parametrize("name", BAD_MODELS)
@pytest.mark.parametrize(
    "command",
    [
        "evaluate {here}/BAD {fasta}",
        "embed {here}/BAD {fasta} --output {here}/x.npz",
        "generate {here}/BAD",
        "report {here}/BAD {fasta} --output {here}/new",
    ],
)
def test_model_folders(command, name, places):
    words = BAD_MODELS[name]
    if command.startswith("generate") and name == "missing":
        words = "is not a model folder"
    line = assert_refused(command.replace("BAD", name), words, places)
    assert line.startswith(f"{places['here']}/{name}")


@pytest.mark.parametrize(
    "command", [TRAIN.removesuffix(" --output {here}/new"), "report {masked} {fasta}", "demo"]
)
def test_output_folders(command, places):
    resume = "" if command.startswith("report") else ", or --resume"
    for place, words in (
        ("{here}/file", "--output {here}/file is a file; give a folder"),
        ("{here}/full", f"--output {{here}}/full is not empty; give another folder{resume}"),
        ("{here}/file/below", "--output {here}/file/below cannot be written ("),
        ("/proc/none", "--output /proc/none cannot be written ("),
    ):
        line = assert_refused(f"{command} --output {place}", words, places)
        assert ("--resume" in line) is (bool(resume) and place.endswith("full"))


@pytest.mark.parametrize(
    ("command", "suffix"), [("embed {masked} {fasta}", ".npz"), ("generate {causal}", ".fasta")]
)
def test_output_files(command, suffix, places):
    for place, words in (
        (f"{{here}}/file/x{suffix}", "{here}/file is not a folder"),
        (f"/proc/none/x{suffix}", "cannot be written"),
        (f"{{here}}/folder{suffix}", "is a folder; give a file"),
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
            (
                f"{command} {{data}} {fasta} {output}",
                "{data} is a folder without a model: it has no",
            )
            for fasta in ("", "{fasta}")
            for command, output in (
                ("evaluate", ""),
                ("embed", "--output {here}/x.npz"),
                ("report", "--output {here}/new"),
                ("probe", "--output {here}/new"),
            )
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
            for value in ("0", "1.5", "nan", "-1")
        ],
        *[
            (f"generate {{causal}} --output {{here}}/x.fasta {flag} {value}", flag)
            for flag, value in (
                *(("--prompt", "M1"), ("--num", 0), ("--max-length", 0), ("--temperature", "nan")),
                *(("--top-k", -1), ("--top-p", 0)),
            )
        ],
        (
            "embed {masked} {fasta} --output {here}/x.npz --pooling max",
            "must be one of mean, mean-sd",
        ),
        ("demo --output {here}/new --steps 0", "--steps must be at least 1"),
        *[
            (f"{TRAIN} {option}", option.split()[0])
            for option in (
                *("--positions none", "--hidden-size 15", "--learning-rate nan", "--seed -1"),
                *(f"--seed {2**32}", "--batch-tokens 0", "--steps many", "--across-sequences"),
            )
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
                ("--repeats 0", "--repeats must be at least 1"),
                ("--features embeddings,size", "'size'"),
                ("--pooling max", "--pooling must be one of mean, mean-sd"),
                ("--labels none.tsv", "none.tsv does not exist"),
                ("--groups none.tsv", "none.tsv does not exist"),
                ("--split random --per-group 1", "--per-group has no use with --split random"),
                ("--split random --groups {here}/clusters.tsv", "--groups has no use with --split"),
            )
        ],
        *[
            (f"{command} {value}", f"must be a 64-bit integer, got {value}")
            for value in (2**63, -(2**63) - 1, 10**30)
            for command in (
                "train a.fasta --output x --num-features",
                "train a.fasta --output x --eval-steps",
                "generate x --top-k",
                "probe a.fasta --output x --repeats",
                "data swissprot --output x --shard-tokens",
                "benchmark decode --output x --head-dim",
                "convert x --data x --output x --lora-rank",
            )
        ],
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
