"""New sequences: the prompt kept, residues only, the same for the same seed."""

import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from performers.app.errors import UserError
from performers.models.manifest import save_model_folder
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, build_protein_tokenizer
from performers.proteins.model_folder import load_model
from performers.proteins.options import SamplingOptions
from performers.proteins.scoring.generation import generate_sequences
from performers.proteins.training.train import train_model
from tests.proteins.runs import make_model, proteins, small_options


@pytest.fixture(scope="module")
def causal():
    return make_model("clm")


def generated(causal, *, progress=None, **options):
    sampling = SamplingOptions(**{"max_length": 30, **options})
    return generate_sequences(*causal, sampling, progress=progress)


def test_records_keep_the_prompt_and_hold_amino_acids_only(causal):
    records = generated(causal, prompt="mk t", num_sequences=40)
    assert [record.name for record in records] == [f"generated-{n}" for n in range(1, 41)]
    for record in records:
        assert record.sequence.startswith("MKT")
        assert set(record.sequence) <= set(AMINO_ACIDS)
        assert 3 <= len(record.sequence) <= 30
    assert len({record.sequence for record in records}) > 30
    # An odd letter of the prompt is kept and never sampled.
    (record,) = generated(causal, prompt="MX")
    assert re.fullmatch(f"MX[{AMINO_ACIDS}]*", record.sequence)
    for temperature in (1e-3, 1e3):
        for record in generated(causal, num_sequences=8, temperature=temperature):
            assert set(record.sequence) <= set(AMINO_ACIDS)


def test_the_seed_decides_and_batches_make_up_the_number(causal):
    first, seen = generated(causal, num_sequences=5, seed=1), []
    assert generated(causal, num_sequences=5, seed=1) == first
    assert generated(causal, num_sequences=5, seed=2) != first
    records = generated(causal, num_sequences=70, progress=lambda *done: seen.append(done))
    assert len(records) == 70
    assert seen == [(32, 70), (64, 70), (70, 70)]


def test_without_a_prompt_there_is_at_least_one_residue(causal):
    model, tokenizer = make_model("clm")
    with torch.no_grad():
        # A model that wants to end at once.
        model.lm_head.bias[tokenizer.eos_token_id] = 50.0
    records = generated((model, tokenizer), num_sequences=5)
    assert [len(record.sequence) for record in records] == [1] * 5
    assert all("cut" not in record.description for record in records)


def test_the_description_tells_length_and_cut(causal):
    records = generated(causal, num_sequences=60, max_length=12)
    for record in records:
        assert record.description.startswith(f"length={len(record.sequence)}")
        if "cut=max-length" in record.description:
            assert len(record.sequence) == 12
    assert len({"cut" in record.description for record in records}) == 2


def test_at_temperature_zero_the_most_likely_residue_follows(causal):
    model, tokenizer = causal
    (record,) = generated(causal, prompt="MK", temperature=0, max_length=10)
    allowed = tokenizer.convert_tokens_to_ids([*AMINO_ACIDS, "<eos>"])
    tokens = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["M", "K"])]
    while len(tokens) < 11 and tokens[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(max(allowed, key=lambda token: float(logits[token])))
    assert record.sequence == tokenizer.decode(tokens, skip_special_tokens=True)
    assert generated(causal, prompt="MK", top_k=1, max_length=10)[0].sequence == record.sequence
    assert generated(causal, prompt="MK", top_p=1e-6, max_length=10)[0].sequence == record.sequence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "MK1"}, "--prompt has letters that are not residues: 1"),
        ({"prompt": "MK*-"}, r"not residues: \* -"),
        ({"prompt": "MKT", "max_length": 3}, "--max-length must exceed the prompt's 3 residues"),
        ({"max_length": 0}, "--max-length"),
        ({"num_sequences": 0}, "--num must be at least 1, got 0"),
        ({"top_k": -1}, "--top-k must be at least 0, got -1"),
        ({"top_p": 0.0}, "--top-p must be above 0"),
        ({"top_p": math.nan}, "--top-p"),
        ({"temperature": -1.0}, "--temperature must be 0 or between"),
        ({"temperature": 1e-9}, "--temperature"),
        ({"temperature": math.inf}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions(**options)


def test_learned_positions_end():
    model = make_model("clm", position_embedding="learned", max_length=20)
    assert generated(model, max_length=20, num_sequences=10)
    with pytest.raises(UserError, match="learned positions for 20 tokens and cannot read 21"):
        generated(model, max_length=21)
    with pytest.raises(UserError, match="predicts masked residues and cannot generate"):
        generated(make_model("mlm"))


def test_a_trained_model_continues_prompts_where_transformers_generates(tmp_path):
    train_model(proteins(), tmp_path, small_options(objective="clm", steps=1))
    ours, _ = load_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("MKT").input_ids) == ["<bos>", *"MKT"]

    ids = tokenizer.convert_tokens_to_ids(["<bos>", *"MKT"])
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(ours(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    generated = model.generate(**tokenizer("MKT", return_tensors="pt"), **length)
    assert generated[0].tolist() == ids
    # The shorter prompt of a batch is padded, which must not be read.
    write = pipeline("text-generation", model=str(tmp_path))
    (alone,), _ = write(["MKT", "MKTAYIAK"], batch_size=2, **length)
    assert alone["generated_text"] == expected


def test_a_model_saved_with_closed_prompts_generates(causal, tmp_path):
    save_model_folder(tmp_path, causal[0], build_protein_tokenizer(40))
    options = {"prompt": "MKT", "num_sequences": 5, "max_length": 30}
    assert generated(load_model(tmp_path), **options) == generated(causal, **options)
