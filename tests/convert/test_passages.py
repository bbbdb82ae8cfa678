"""Texts cut into inputs of a model."""

import gzip

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from performers.convert.distillation.pretrained import load_model
from performers.convert.distillation.texts import text_windows
from tests.benchmark.tiny_models import AMINO_ACIDS, VOCABULARY, save_bert


@pytest.fixture
def proteins(tmp_path):
    return load_model(save_bert(tmp_path)).tokenizer


def test_windows_are_consecutive_passages_between_special_tokens(proteins, tmp_path):
    residues = [AMINO_ACIDS[(i * i + i // 7) % 20] for i in range(400)]
    (tmp_path / "text.txt").write_text(" ".join(residues))
    windows = text_windows(proteins, tmp_path / "text.txt", 12, 5)
    assert windows.shape == (5, 12)
    assert windows.dtype == torch.int64
    assert set(windows[:, 0].tolist()) == {2}
    assert set(windows[:, -1].tolist()) == {3}
    expected = [VOCABULARY.index(letter) for letter in residues]
    assert windows[:, 1:-1].flatten().tolist() == expected[:50]
    later = text_windows(proteins, tmp_path / "text.txt", 12, 2, skip=3)
    assert torch.equal(later, windows[3:])


def test_windows_of_a_long_file_are_those_of_its_whole_text(tmp_path):
    """A reader that stops inside a word and keeps its beginning would end on an unknown word."""
    vocabulary = {"<unk>": 0} | {f"token{i:02d}": i + 1 for i in range(40)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    expected = [(i * 7) % 40 + 1 for i in range(5000)]
    for gap in (0, 2, 30):
        words = [" " * gap + f"token{index - 1:02d}" for index in expected]
        (tmp_path / "long.txt").write_text(" " * 3 + "\n".join(words))
        for count in (1, 7, 50):
            windows = text_windows(tokenizer, tmp_path / "long.txt", 100, count)
            assert windows.flatten().tolist() == expected[: 100 * count]


def test_fasta_is_read_residue_by_residue(proteins, tmp_path):
    (tmp_path / "p.fasta").write_text(">one first\nACD\nef*\n\n>empty\n>two\nWWY\n")
    windows = text_windows(proteins, tmp_path / "p.fasta", 11, 1)
    names = [VOCABULARY[index] for index in windows[0].tolist()]
    assert names == ["[CLS]", *"ACDEF", "[SEP]", *"WWY", "[SEP]"]


def test_a_compressed_file_is_read_as_it_is(proteins, tmp_path):
    text = (">one\n" + AMINO_ACIDS * 40 + "\n").encode()
    (tmp_path / "p.fasta").write_bytes(text)
    whole = gzip.compress(text)
    (tmp_path / "p.fasta.gz").write_bytes(whole)
    windows = text_windows(proteins, tmp_path / "p.fasta.gz", 30, 5)
    assert torch.equal(windows, text_windows(proteins, tmp_path / "p.fasta", 30, 5))
    (tmp_path / "p.fasta.gz").write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=r"p\.fasta\.gz is a damaged gzip file"):
        text_windows(proteins, tmp_path / "p.fasta.gz", 30, 40)


def test_texts_that_will_not_do(proteins, tmp_path):
    text = tmp_path / "text.txt"
    with pytest.raises(FileNotFoundError, match=r"text.txt: no such text file"):
        text_windows(proteins, text, 8, 1)
    text.write_text("A C D E F G H")
    with pytest.raises(ValueError, match=r"text.txt has 7 tokens, enough for 1 windows of 8; 2"):
        text_windows(proteins, text, 8, 2)
    text.write_text("")
    with pytest.raises(ValueError, match="has 0 tokens"):
        text_windows(proteins, text, 8, 1)
    text.write_text("it is a truth universally acknowledged")
    with pytest.raises(ValueError, match="100% of the tokens are unknown"):
        text_windows(proteins, text, 6, 1)
    text.write_bytes(b"A C \xff\xfe D")
    with pytest.raises(ValueError, match=r"text\.txt is not a UTF-8 text file"):
        text_windows(proteins, text, 5, 1)
    with pytest.raises(ValueError, match="tokenizer is None"):
        text_windows(None, text, 5, 1)
    for length, count, skip in ((2, 1, 0), (8, 0, 0), (8, 1, -1)):
        with pytest.raises(ValueError, match=r"length must exceed the 2 special tokens"):
            text_windows(proteins, text, length, count, skip=skip)
