"""Passages of one length from the beginning of a text."""

import gzip

import pytest
import torch
from tokenizers import pre_tokenizers

from performers.convert.distillation.pretrained import load_model
from studies.passages import text_windows
from tests.benchmark.tiny_models import AMINO_ACIDS, VOCABULARY, save_bert
from tests.convert.test_texts import word_tokenizer


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    return load_model(save_bert(tmp_path_factory.mktemp("bert"))).tokenizer


@pytest.fixture
def text(tmp_path):
    return tmp_path / "text.txt"


def test_windows_are_consecutive_passages_between_special_tokens(proteins, text):
    letters = [AMINO_ACIDS[(i * i + i // 7) % 20] for i in range(400)]
    text.write_text(" ".join(letters))
    windows = text_windows(proteins, text, 12, 5)
    assert windows.shape == (5, 12)
    assert windows.dtype == torch.int64
    assert set(windows[:, 0].tolist()) == {2}
    assert set(windows[:, -1].tolist()) == {3}
    expected = [VOCABULARY.index(letter) for letter in letters]
    assert windows[:, 1:-1].flatten().tolist() == expected[:50]
    assert torch.equal(text_windows(proteins, text, 12, 2, skip=3), windows[3:])


def test_windows_of_a_long_file_are_those_of_its_whole_text(text):
    """A reader that stops inside a word and keeps its beginning would end on an unknown word."""
    vocabulary = {f"token{i:02d}": i + 1 for i in range(40)}
    tokenizer = word_tokenizer(vocabulary, pre_tokenizers.WhitespaceSplit())
    expected = [(i * 7) % 40 + 1 for i in range(5000)]
    for gap in (0, 2, 30):
        words = [" " * gap + f"token{index - 1:02d}" for index in expected]
        text.write_text(" " * 3 + "\n".join(words))
        for count in (1, 7, 50):
            windows = text_windows(tokenizer, text, 100, count)
            assert windows.flatten().tolist() == expected[: 100 * count]


def test_windows_of_fasta_are_read_residue_by_residue(proteins, tmp_path):
    plain, packed = tmp_path / "p.fasta", tmp_path / "p.fasta.gz"
    plain.write_text(">one first\nACD\nef*\n\n>empty\n>two\nWWY\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    windows = text_windows(proteins, plain, 11, 1)
    names = [VOCABULARY[index] for index in windows[0].tolist()]
    assert names == ["[CLS]", *"ACDEF", "[SEP]", *"WWY", "[SEP]"]
    assert torch.equal(text_windows(proteins, packed, 11, 1), windows)


@pytest.mark.parametrize(
    ("content", "words"),
    [("A C D", "text.txt has 3 tokens, enough for 0 windows of 6; 1"), ("", "has 0 tokens")],
)
def test_a_text_that_is_too_short(content, words, proteins, text):
    text.write_text(content)
    with pytest.raises(ValueError, match=words):
        text_windows(proteins, text, 6, 1)
