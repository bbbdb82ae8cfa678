"""Texts cut into inputs of a model: windows, and examples of which no part sees another."""

import gzip
from collections import Counter
from itertools import islice

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader

from performers.convert.distillation.pretrained import load_model
from performers.convert.distillation.texts import split_text
from tests.benchmark.tiny_models import AMINO_ACIDS, VOCABULARY, save_bert


def word_tokenizer(vocabulary, splitter, **special):
    raw = Tokenizer(models.WordLevel({"<unk>": 0, **vocabulary}, unk_token="<unk>"))
    raw.pre_tokenizer = splitter
    if special:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def numbers():
    """A tokenizer whose words are numbers, each its own id, between <s> and </s>."""
    vocabulary = {"<s>": 1, "</s>": 2} | {str(i): i for i in range(3, 20_000)}
    splitter = pre_tokenizers.WhitespaceSplit()
    return word_tokenizer(vocabulary, splitter, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    return load_model(save_bert(tmp_path_factory.mktemp("bert"))).tokenizer


@pytest.fixture
def text(tmp_path):
    return tmp_path / "text.txt"


def write(path, count=15_000, separator=" "):
    path.write_text(separator.join(str(i) for i in range(3, count)))
    return path


def rows(examples):
    return [example["input_ids"].tolist() for example in examples]


def one_pass(train):
    """All training examples of a pass."""
    train.passes = 1
    return list(train)


@pytest.mark.parametrize("separator", [" ", "\n", "\r\n", "\n\n   "])
def test_the_parts_are_windows_that_share_no_token(numbers, text, separator):
    parts = split_text(numbers, write(text, separator=separator), 32, calibration=20, test=10)
    assert (len(parts.calibration), len(parts.test)) == (20, 10)
    seen = []
    for part in (parts.calibration, one_pass(parts.train), parts.test):
        for row, example in zip(rows(part), part, strict=True):
            assert len(row) == 32
            assert (row[0], row[-1]) == (1, 2)
            assert row[1:-1] == list(range(row[1], row[1] + 30)), "a window is a passage"
            assert example["attention_mask"].tolist() == [1] * 32
            seen += row[1:-1]
    assert len(seen) == len(set(seen)), "no token is in two places"
    # Only what fills no window at a block's end is lost.
    assert len(seen) > 0.93 * (15_000 - 3)


def test_the_test_part_is_the_end_of_the_file(numbers, text):
    parts = split_text(numbers, write(text), 32, test=10)
    first = min(min(row[1:-1]) for row in rows(parts.test))
    others = rows(parts.calibration) + rows(one_pass(parts.train))
    assert max(max(row) for row in others) < first
    assert first > 14_000
    share = split_text(numbers, text, 32, calibration=0, test=0.25)
    assert share.calibration == []
    # The last numbers take six bytes each.
    begin = 15_000 - 0.25 * text.stat().st_size / 6
    assert min(row[1] for row in rows(share.test)) == pytest.approx(begin, abs=2)
    assert len(share.test) == int((15_000 - begin) // 30)


def test_calibration_is_spread_over_what_is_trained_on(numbers, text):
    parts = split_text(numbers, write(text), 32, calibration=5, test=10)
    places = [row[1] for row in rows(parts.calibration)]
    assert places == sorted(places)
    assert places[0] < 4000 < 10_000 < places[-1]


def test_the_order_is_the_seeds_and_new_in_every_pass(numbers, text):
    write(text, 8000)
    count = len(one_pass(split_text(numbers, text, 32, seed=1).train))
    first, again, other = (
        rows(islice(split_text(numbers, text, 32, seed=seed).train, 2 * count))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    passes = first[:count], first[count:]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) != passes[0]
    assert len({tuple(row) for row in passes[0]}) == count


def test_workers_share_the_examples(numbers, text):
    train = split_text(numbers, write(text, 4000), 32).train
    alone = rows(one_pass(train))
    shared = list(DataLoader(train, batch_size=None, num_workers=2))
    assert sorted(rows(shared)) == sorted(alone)


def test_a_text_without_spaces_is_cut_between_letters(text):
    alphabet = {chr(0x4E00 + i): i + 1 for i in range(2000)}
    letters = word_tokenizer(alphabet, pre_tokenizers.Split("", "isolated"))
    text.write_text("\ufeff" + "".join(list(alphabet)[:1900]), encoding="utf-8")
    parts = split_text(letters, text, 16, calibration=4, test=5)
    seen = rows(parts.calibration) + rows(one_pass(parts.train)) + rows(parts.test)
    flat = [index for row in seen for index in row]
    assert 0 not in flat
    assert len(flat) == len(set(flat)) > 1700
    assert min(flat) == 1, "the byte order mark is no letter"


def residues(number, length):
    return "".join(AMINO_ACIDS[(number + i * i) % 20] for i in range(length))


def test_a_fasta_file_gives_one_sequence_a_row(proteins, tmp_path):
    records = [residues(i, 3 + (37 * i) % 90) for i in range(300)]
    text = "".join(f">p{i} a > b\n{x[:40].lower()}\n{x[40:]}\n" for i, x in enumerate(records))
    (tmp_path / "p.fasta.gz").write_bytes(gzip.compress(text.encode()))
    parts = split_text(proteins, tmp_path / "p.fasta.gz", 40, calibration=8, test=30)
    wanted = [[2, *(VOCABULARY.index(x) for x in record[:38]), 3] for record in records]
    assert rows(parts.test) == wanted[-len(parts.test) :]
    everything = rows(parts.calibration) + rows(one_pass(parts.train)) + rows(parts.test)
    # What lies between training and test is used for neither.
    assert 285 < len(everything) <= 300
    # The sequences repeat one another.
    used, there = Counter(map(tuple, everything)), Counter(map(tuple, wanted))
    assert not used - there, "every record is used once"


def test_short_sequences_are_not_lost_between_training_and_test(proteins, tmp_path):
    """Training has what the test leaves over, also where examples could be far longer."""
    draws = torch.randint(20, (200, 40), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path / "short.fasta"
    path.write_text("".join(f">p\n{''.join(AMINO_ACIDS[x] for x in row)}\n" for row in draws))
    parts = split_text(proteins, path, 512, calibration=10, test=100)
    seen = set(map(tuple, rows(islice(parts.train, 400))))
    tested = set(map(tuple, rows(parts.test)))
    assert len(tested) == 100
    assert len(seen) > 50
    assert not seen & tested


SENTENCE = b"it is a truth universally acknowledged "
SHORT = " ".join(map(str, range(3, 300))).encode()

# Content of the file, options, the error's words.
CASES = [
    (None, {}, r"text\.txt: no such text file"),
    (SHORT, {"tokenizer": None}, "tokenizer is None"),
    (SHORT, {"length": 2}, "length must exceed the 2 special tokens"),
    (SENTENCE * 200, {}, r"\d+% of the tokens are unknown"),
    (b"3 4 \xff\xfe 5 " * 200, {}, r"text\.txt is not a UTF-8 text file"),
    (gzip.compress(b"3 4 5 " * 20_000)[:-30], {}, "is a damaged gzip file"),
    (SHORT, {"test": 40}, "too little text: 21 examples, and 40 were asked for"),
    (SHORT, {"test": 10, "calibration": 15}, "besides 10 test examples of 16 tokens"),
    (SHORT, {"test": 0.01}, r"no test example in its last 1\.0%"),
]
CASES += [(SHORT, {"test": x}, "test must be a number of examples") for x in (0, -1, 0.0, -0.5)]


@pytest.mark.parametrize(("content", "options", "words"), CASES)
def test_what_will_not_do(content, options, words, numbers, text):
    if content is not None:
        text.write_bytes(content)
    options = {"tokenizer": numbers, "length": 16, "test": 2, "calibration": 2, **options}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        split_text(options.pop("tokenizer"), text, **options)
