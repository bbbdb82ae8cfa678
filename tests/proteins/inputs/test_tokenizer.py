"""The protein tokenizer: ids, awkward text, saving and loading without this package."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, pipeline

from performers.proteins.inputs.tokenizer import (
    AMBIGUOUS,
    AMINO_ACIDS,
    SPECIAL_TOKENS,
    build_protein_tokenizer,
    encode_sequences,
    residue_ids,
)

LETTERS = AMINO_ACIDS + AMBIGUOUS


@pytest.fixture
def tokenizer():
    return build_protein_tokenizer(closed=True)


def test_the_vocabulary_is_the_documented_one(tokenizer):
    assert AMINO_ACIDS == "ACDEFGHIKLMNPQRSTVWY"
    assert sorted(LETTERS) == [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    expected = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>", *"ACDEFGHIKLMNPQRSTVWYXBZUOJ"]
    assert len(tokenizer) == tokenizer.vocab_size == 31
    assert tokenizer.convert_ids_to_tokens(range(31)) == expected
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.unk_token_id, tokenizer.mask_token_id) == (3, 4)
    assert sorted(tokenizer.all_special_tokens) == sorted(SPECIAL_TOKENS)
    assert tokenizer.is_fast
    assert tokenizer.padding_side == "right"


def test_letters_are_framed_and_in_order(tokenizer):
    encoded = tokenizer("ACD")
    assert dict(encoded) == {"input_ids": [1, 5, 6, 7, 2], "attention_mask": [1] * 5}
    assert tokenizer("ACD", add_special_tokens=False)["input_ids"] == [5, 6, 7]
    assert tokenizer("")["input_ids"] == [1, 2]
    assert tokenizer("AC", "DE", return_token_type_ids=True)["token_type_ids"] == [0] * 4 + [1] * 3


@pytest.mark.parametrize(
    "text", ["mktll", "MkT lL", " M\tK\nT\r\nL\x0bL ", "M\u00a0KT\u2003LL\u2028"]
)
def test_case_and_white_space_do_not_matter(tokenizer, text):
    assert tokenizer(text)["input_ids"] == tokenizer("MKTLL")["input_ids"]


@pytest.mark.parametrize(
    "character", [*"*-.1?<>_", "é", "ß", "ſ", "ı", "Ａ", "ﬁ", "Α", "😀", "\x00"]
)
def test_any_other_character_is_one_unknown_token(tokenizer, character):
    assert tokenizer(f"M{character}K")["input_ids"] == [1, 15, 3, 13, 2]


def test_special_tokens_in_the_text_are_single_tokens(tokenizer):
    ids = tokenizer("MKT<mask>LL")["input_ids"]
    assert ids == tokenizer("mkt <mask> ll")["input_ids"]
    assert ids == [1, *residue_ids(tokenizer, "MKT"), 4, *residue_ids(tokenizer, "LL"), 2]
    assert tokenizer.decode(ids) == "<bos>MKT<mask>LL<eos>"


def test_padding_and_truncation(tokenizer):
    batch = tokenizer(["MK", "MKTL"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist()[0] == [1, 15, 13, 2, 0, 0]
    assert batch["attention_mask"].tolist()[0] == [1, 1, 1, 1, 0, 0]
    bounded = build_protein_tokenizer(model_max_length=6, closed=True)
    assert bounded("MKTLLV", truncation=True)["input_ids"] == [1, 15, 13, 21, 14, 2]
    with pytest.raises(ValueError, match="model_max_length"):
        build_protein_tokenizer(model_max_length=2)


@settings(max_examples=100)
@given(st.text(LETTERS + LETTERS.lower(), max_size=300))
def test_decoding_gives_the_sequence_back(text):
    tokenizer = build_protein_tokenizer(closed=True)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.upper()
    assert len(ids) == len(text) + 2


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.sampled_from([*LETTERS, *"abz *-\n<>é", "<mask>", "<pad>"])).map("".join))
)
def test_the_fast_path_agrees_with_the_general_call(texts):
    tokenizer, causal = build_protein_tokenizer(closed=True), build_protein_tokenizer()
    # Settings of an earlier call must not leak into the fast path.
    for each in (tokenizer, causal):
        each(["MKTLL", "M"], padding="max_length", truncation=True, max_length=4)
    fast = encode_sequences(tokenizer, texts)
    assert all(row.dtype == np.int16 for row in fast)
    assert [row.tolist() for row in fast] == [tokenizer(text)["input_ids"] for text in texts]
    # A causal model is trained on the same rows.
    assert [row.tolist() for row in encode_sequences(causal, texts)] == [r.tolist() for r in fast]


def test_a_causal_model_reads_a_prompt():
    tokenizer = build_protein_tokenizer(model_max_length=6)
    assert tokenizer("MKT")["input_ids"] == [1, 15, 13, 21]
    assert tokenizer("")["input_ids"] == [1]
    batch = tokenizer(["MK", "MKTL"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist()[0] == [0, 0, 1, 15, 13]
    assert batch["attention_mask"].tolist()[0] == [0, 0, 1, 1, 1]
    assert tokenizer("MKTLLVV", truncation=True)["input_ids"] == [1, 15, 13, 21, 14, 14]


def test_the_fast_path_over_several_chunks(tokenizer, monkeypatch):
    sequences = ["A" * length for length in [3, 100, 0, 7, 50, 1]]
    whole = encode_sequences(tokenizer, sequences)
    monkeypatch.setattr("performers.proteins.inputs.tokenizer._LETTERS_PER_CALL", 60)
    chunked = encode_sequences(tokenizer, sequences)
    assert [row.tolist() for row in chunked] == [row.tolist() for row in whole]
    assert [row.size for row in whole] == [5, 102, 2, 9, 52, 3]


@pytest.mark.exhaustive
def test_a_saved_tokenizer_loads_in_a_fresh_process_without_this_package(tokenizer, tmp_path):
    # A model folder with a type that transformers alone does not know, saved after a call whose
    # settings the backend keeps.
    tokenizer(["MKTLL", "M"], padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "performer"}))
    seen = (
        "[t(['mkt<mask>l l', 'AC\u00df'])['input_ids'], t.decode([1, 15, 4, 14, 2]), len(t),"
        " t.decode([1, 15, 4, 14, 2], skip_special_tokens=True), t.all_special_ids, t.mask_token,"
        " t.model_input_names, t.padding_side]"
    )
    program = (
        "import json, sys\n"
        "from transformers import AutoTokenizer\n"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path)!r})\n"
        "assert not any(name.startswith('performers') for name in sys.modules)\n"
        f"print(json.dumps({seen}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", program]
    printed = subprocess.check_output(command, cwd=tmp_path, env=environment)
    assert json.loads(printed) == eval(seen, {"t": build_protein_tokenizer(closed=True)})


def test_fill_mask_pipeline(tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, pad_token_id=0,
    )  # fmt: skip
    fill = pipeline("fill-mask", model=BertForMaskedLM(config).eval(), tokenizer=tokenizer)
    targets = ["W", "A"]
    answers = fill("MKT<mask>LL", targets=targets)
    assert sorted(answer["token_str"] for answer in answers) == sorted(targets)
    assert {answer["sequence"] for answer in answers} == {"MKTWLL", "MKTALL"}
    assert len(fill("MKT<mask>LL")) == 5
    assert [len(answer) for answer in fill("mk<mask>t<mask>")] == [5, 5]


def test_tokenizers_that_do_not_fit_are_refused(tokenizer):
    assert residue_ids(tokenizer).tolist() == list(range(5, 31))
    with pytest.raises(ValueError, match=r"1, \? not found"):
        residue_ids(tokenizer, "A1?")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="expected a bos_token and an eos_token"):
        encode_sequences(tokenizer, ["MK"])
