"""The commands on texts: bytes and subwords, resumed, evaluated, and what they refuse."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from performers.streams import subwords
from performers.streams.evaluation import evaluate_texts
from performers.streams.subwords import byte_tokenizer, write_subwords
from performers.streams.text import read_bytes
from tests.cli.commands import refusal, run
from tests.streams.texts import write_texts

SHAPE = (
    *("--objective", "clm", "--hidden-size", 16, "--layers", 1, "--heads", 2),
    *("--num-features", 8, "--max-length", 16, "--batch-tokens", 48, "--steps", 2),
)


SPARSE = Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")).to_str().encode()
"""A tokenizer of two tokens whose numbers have a gap."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "bytes"
    run("train", texts, "--output", folder, "--carry-state", *SHAPE)
    return folder


def test_a_model_of_bytes_loads_and_evaluates(texts, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("naïve\n\0", add_special_tokens=False)["input_ids"]
    assert ids == list("naïve\n\0".encode())
    assert tokenizer.decode(ids) == "naïve\n\0"
    network = AutoModelForCausalLM.from_pretrained(model)
    read = read_bytes(sorted(texts.iterdir()), print)
    for flags, carry in (((), False), (("--carry-state",), True)):
        metrics = json.loads(run("evaluate", model, texts, "--json", *flags)[0])
        expected = evaluate_texts(network, read, length=16, carry=carry)
        assert metrics["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
        assert metrics["tokens"] == sum(n - 1 for n in read.lengths)
    out = run("evaluate", model, texts)[0]
    assert "bits per byte" in out


def test_subwords_are_written_once_and_counted_in_bytes(texts, tmp_path):
    coder = Tokenizer(models.BPE(unk_token="[UNK]"))
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    coder.train_from_iterator([file.read_text() for file in texts.iterdir()], trainer)
    coder.save(str(tmp_path / "tokenizer.json"))
    mixed = write_texts(tmp_path / "mixed")
    (mixed / "latin.txt").write_bytes("Brontë".encode("latin-1") * 5)
    (mixed / "upper.txt").write_text("ONE two")
    given = ("train", mixed, "--tokenizer", tmp_path / "tokenizer.json", *SHAPE)
    # A run that was killed before its first step begins anew.
    error = "\n".join(run(*given, "--output", tmp_path / "model", "--resume")[1])
    assert "1 of 8 files left out as not UTF-8 text: latin.txt at byte 5" in error
    assert "the tokenizer does not give back 1 of 7 texts" in error
    assert "upper.txt; their bits per byte are too low to compare" in error
    data = json.loads((tmp_path / "model" / "training.json").read_text())["data"]
    assert data["tokens"] < data["bytes"]
    metrics = json.loads(run("evaluate", tmp_path / "model", texts, "--json")[0])
    read = [coder.encode(file.read_text()).ids for file in texts.iterdir()]
    size = sum(file.stat().st_size for file in texts.iterdir())
    bits = metrics["loss"] / 0.6931471805599453 * sum(map(len, read)) / size
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert metrics["tokens"] == sum(len(ids) - 1 for ids in read)


def test_a_tokenizer_that_changes_letters_is_reported(tmp_path):
    coder = byte_tokenizer(16)
    coder.backend_tokenizer.normalizer = normalizers.Lowercase()
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, content in zip(files, ("Upper", "lower"), strict=True):
        file.write_text(content)
    said = [], []
    for lines in said:
        write_subwords(files, coder, tmp_path / "tokens", lines.append)
    assert said[0] == said[1], "also when tokens are read again"
    assert said[0][0].startswith("the tokenizer does not give back 1 of 2 texts")
    # The same vocabulary, other tokens.
    lines = []
    write_subwords(files, byte_tokenizer(16), tmp_path / "tokens", lines.append)
    assert not lines


def test_long_texts_are_encoded_in_pieces(tmp_path, monkeypatch):
    """Cut at lines, or at spaces where there are none, never within a letter."""
    monkeypatch.setattr(subwords, "_PIECE", 7)
    coder = byte_tokenizer(16)
    for content in ("öä\nü öäüö äö\nü", "öäöäöäöäöäöä", "ab cd ef gh\n", "abcdef\nabcdef\n"):
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        read = write_subwords([tmp_path / "a.txt"], coder, tmp_path / "tokens", print)
        assert bytes(read.read(0, 0, 99).tolist()).decode() == content
        assert write_subwords([tmp_path / "a.txt"], coder, tmp_path / "tokens", print) == read
        (tmp_path / "tokens" / "tokens.json").unlink()
    (tmp_path / "a.txt").write_bytes("öä\nüäö\n".encode() + b"\xff\xff")
    (tmp_path / "b.txt").write_text("ok")
    lines = []
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    read = write_subwords(files, coder, tmp_path / "tokens", lines.append)
    assert [bytes(read.read(0, 0, 99).tolist()), len(read.documents)] == [b"ok", 1]
    assert lines == ["1 of 2 files left out as not UTF-8 text: a.txt at byte 12"]


def test_files_that_are_no_text_are_counted_and_the_rest_is_read(tmp_path):
    folder = write_texts(tmp_path / "texts")
    (folder / "empty.txt").touch()
    (folder / "one.txt").write_bytes(b"x")
    (folder / "image.txt").write_bytes(b"\x89PNG\0\0")
    (folder / "letters.TXT").write_text("xy")
    (folder / "broken.txt").symlink_to("nowhere")
    (folder / "folder.txt").mkdir()
    error = "\n".join(run("train", folder, "--output", tmp_path / "model", *SHAPE)[1])
    assert "1 of 11 files left out as empty: empty.txt" in error
    assert "1 of 11 files left out as of one byte, which has no next one to predict: one" in error
    assert "1 of 11 files left out as binary or UTF-16 (they have zero bytes): image" in error
    assert "1 of 11 files left out as no regular files: broken.txt" in error
    data = json.loads((tmp_path / "model" / "training.json").read_text())["data"]
    assert data["texts"] + data["validation_texts"] == 7


@pytest.mark.parametrize(
    ("files", "flags", "words"),
    [
        ({"a.txt": b""}, (), "there is no text to read; 1 of 1 files left out as empty: a.txt"),
        ({"a.txt": b"text", "b.fasta": b">p\nMKT\n"}, ("b.fasta",), "b.fasta is no .txt file"),
        ({"a.txt": b"text"}, ("none",), "none does not exist"),
        ({"a.txt": b"text", "sub/b.md": b"x"}, ("sub",), "sub holds no .txt files"),
        ({"a.txt": b"text"}, ("a.txt",), "given more than once"),
        ({"a.txt": b"text", "b/c.txt": b"x"}, ("b/../a.txt",), "given more than once"),
        ({"a.txt": b"text"}, ("--validation", "."), "a.txt is trained on too"),
        ({"a.txt": b"text", "t": SPARSE}, ("--tokenizer", "t"), "numbers its 2 tokens up to 7"),
        ({"a.txt": b"text"}, ("--tokenizer", "none"), "--tokenizer none does not exist"),
        ({"a.txt": b"text", "t": b"{"}, ("--tokenizer", "t"), "--tokenizer t cannot be read"),
        ({"a.txt": b"text"}, ("--packed",), "--packed is for sequences"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused(files, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert words in refusal("train", "a.txt", "--output", "model", *SHAPE, *flags)


def test_commands_on_proteins_refuse_models_of_text_and_the_reverse(texts, model, tmp_path):
    fasta = tmp_path / "p.fasta"
    fasta.write_text(">p\nMKT\n")
    for command in (("generate", model), ("score", model, fasta), ("evaluate", model, fasta)):
        assert f"{model} is a model of text" in refusal(*command)
    run("train", fasta, "--output", tmp_path / "proteins", *SHAPE)
    assert "is a model of proteins" in refusal("evaluate", tmp_path / "proteins", texts)
    assert "--carry-state is for texts" in refusal("evaluate", model, fasta, "--carry-state")
    carried = refusal("train", fasta, "--output", tmp_path / "m", "--carry-state", *SHAPE)
    assert "--carry-state is for texts" in carried
    run("train", texts, "--output", tmp_path / "l", "--positions", "learned", *SHAPE)
    assert "learned ones end at 16" in refusal("evaluate", tmp_path / "l", texts, "--carry-state")
