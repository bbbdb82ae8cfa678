"""Examples of a file: what they are, and that no part sees another."""

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
from tests.benchmark.tiny_models import VOCABULARY, save_bert

WORDS = 20_000


@pytest.fixture(scope="module")
def numbers():
    """A tokenizer whose words are numbers, each its own id, between <s> and </s>."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {str(i): i for i in range(3, WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    return load_model(save_bert(tmp_path_factory.mktemp("bert"))).tokenizer


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
def test_the_parts_are_windows_that_share_no_token(numbers, tmp_path, separator):
    path = write(tmp_path / "text.txt", separator=separator)
    parts = split_text(numbers, path, 32, calibration=20, test=10)
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


def test_the_test_part_is_the_end_of_the_file(numbers, tmp_path):
    path = write(tmp_path / "text.txt")
    parts = split_text(numbers, path, 32, test=10)
    first = min(min(row[1:-1]) for row in rows(parts.test))
    others = rows(parts.calibration) + rows(one_pass(parts.train))
    assert max(max(row) for row in others) < first
    assert first > 14_000
    share = split_text(numbers, path, 32, test=0.25)
    # The last numbers take six bytes each.
    begin = 15_000 - 0.25 * path.stat().st_size / 6
    assert min(row[1] for row in rows(share.test)) == pytest.approx(begin, abs=2)
    assert len(share.test) == int((15_000 - begin) // 30)


def test_calibration_is_spread_over_what_is_trained_on(numbers, tmp_path):
    parts = split_text(numbers, write(tmp_path / "text.txt"), 32, calibration=5, test=10)
    places = [row[1] for row in rows(parts.calibration)]
    assert places == sorted(places)
    assert places[0] < 4000 < 10_000 < places[-1]


def test_the_order_is_the_seeds_and_new_in_every_pass(numbers, tmp_path):
    path = write(tmp_path / "text.txt")
    first, again, other = (
        list(islice(split_text(numbers, path, 32, seed=seed).train, 900)) for seed in (1, 1, 2)
    )
    assert rows(first) == rows(again)
    assert rows(first) != rows(other)
    count = len(one_pass(split_text(numbers, path, 32, seed=1).train))
    assert 400 < count < 500
    passes = rows(first[:count]), rows(first[count : 2 * count])
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1])
    assert len({tuple(row) for row in passes[0]}) == count
    assert passes[0] != sorted(passes[0])


def test_workers_share_the_examples(numbers, tmp_path):
    train = split_text(numbers, write(tmp_path / "text.txt", 4000), 32).train
    alone = rows(one_pass(train))
    shared = list(DataLoader(train, batch_size=None, num_workers=2))
    assert sorted(rows(shared)) == sorted(alone)


def test_a_text_without_spaces_is_cut_between_letters(tmp_path):
    alphabet = {"<unk>": 0} | {chr(0x4E00 + i): i + 1 for i in range(2000)}
    raw = Tokenizer(models.WordLevel(alphabet, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    path = tmp_path / "text.txt"
    path.write_text("\ufeff" + "".join(chr(0x4E00 + i) for i in range(1900)), encoding="utf-8")
    parts = split_text(letters, path, 16, calibration=4, test=5)
    seen = rows(parts.calibration) + rows(one_pass(parts.train)) + rows(parts.test)
    flat = [index for row in seen for index in row]
    assert 0 not in flat
    assert len(flat) == len(set(flat)) > 1700
    assert min(flat) == 1, "the byte order mark is no letter"


def residues(number, length):
    return "".join("ACDEFGHIKLMNPQRSTVWY"[(number + i * i) % 20] for i in range(length))


def test_a_fasta_file_gives_one_sequence_a_row(proteins, tmp_path):
    lengths = [3 + (37 * i) % 90 for i in range(300)]
    records = [residues(i, length) for i, length in enumerate(lengths)]
    text = "".join(
        f">p{i} some > text\n{record[:40].lower()}\n{record[40:]}\n"
        for i, record in enumerate(records)
    )
    (tmp_path / "p.fasta.gz").write_bytes(gzip.compress(text.encode()))
    parts = split_text(proteins, tmp_path / "p.fasta.gz", 40, calibration=8, test=30)

    def expected(record):
        return [2, *(VOCABULARY.index(letter) for letter in record[:38]), 3]

    assert (
        rows(parts.test) == [expected(record) for record in records[-30:]]
        or rows(parts.test)
        == [expected(record) for record in records[-len(records) :]][-len(parts.test) :]
    )
    everything = rows(parts.calibration) + rows(one_pass(parts.train)) + rows(parts.test)
    wanted = [expected(record) for record in records]
    assert all(row in wanted for row in everything)
    # The sequences repeat one another. What lies between training and test is used for neither.
    assert 285 < len(everything) <= 300
    counts = Counter(map(tuple, wanted))
    assert not Counter(map(tuple, everything)) - counts, "every record is used once"


def test_what_will_not_do(numbers, proteins, tmp_path):
    path = tmp_path / "text.txt"
    with pytest.raises(FileNotFoundError, match=r"text\.txt: no such text file"):
        split_text(numbers, path, 16)
    write(path, 300)
    with pytest.raises(ValueError, match="tokenizer is None"):
        split_text(None, path, 16)
    with pytest.raises(ValueError, match="length must exceed the 2 special tokens, got 2"):
        split_text(numbers, path, 2)
    for test in (0, -1, 0.0, -0.5):
        with pytest.raises(ValueError, match="test must be a number of examples"):
            split_text(numbers, path, 16, test=test)
    with pytest.raises(ValueError, match="calibration must be at least 0, got -1"):
        split_text(numbers, path, 16, calibration=-1)
    with pytest.raises(ValueError, match="too little text: 21 examples, and 40 were asked for"):
        split_text(numbers, path, 16, test=40)
    with pytest.raises(ValueError, match="besides 10 test examples of 16 tokens there must be"):
        split_text(numbers, path, 16, test=10, calibration=15)
    with pytest.raises(ValueError, match=r"no test example in its last 1\.0%"):
        split_text(numbers, path, 16, test=0.01)
    path.write_text("it is a truth " * 200)
    with pytest.raises(ValueError, match="88% of the tokens are unknown"):
        split_text(numbers, path, 16, test=2, calibration=2)
    path.write_bytes(b"3 4 5 " * 200 + b"\xff\xfe" + b" 6" * 20)
    with pytest.raises(ValueError, match=r"text\.txt is not a UTF-8 text file"):
        split_text(numbers, path, 16, test=1)
    packed = gzip.compress(b"3 4 5 " * 20_000)
    path.write_bytes(packed[:-30])
    with pytest.raises(ValueError, match=r"text\.txt is a damaged gzip file"):
        split_text(numbers, path, 16)


def test_calibration_may_be_left_out(numbers, tmp_path):
    parts = split_text(numbers, write(tmp_path / "text.txt"), 32, calibration=0)
    assert parts.calibration == []
    assert torch.is_tensor(next(iter(parts.train))["input_ids"])


def test_short_sequences_are_not_lost_between_training_and_test(proteins, tmp_path):
    """Training has what the test leaves over, also where examples could be far longer."""
    letters = "ACDEFGHIKLMNPQRSTVWY"
    draws = torch.randint(20, (200, 40), generator=torch.Generator().manual_seed(0)).tolist()
    path = tmp_path / "short.fasta"
    path.write_text("".join(f">p\n{''.join(letters[x] for x in row)}\n" for row in draws))
    parts = split_text(proteins, path, 512, calibration=10, test=100)
    seen = {tuple(example["input_ids"].tolist()) for example in islice(parts.train, 400)}
    tested = {tuple(example["input_ids"].tolist()) for example in parts.test}
    assert len(tested) == 100
    assert len(seen) > 50
    assert not seen & tested
