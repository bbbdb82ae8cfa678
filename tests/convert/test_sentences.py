"""Models of sentence-transformers: converted, saved, opened, and with longer inputs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models

from performers.convert import distill, extend_positions_, load_performer, to_performer
from performers.convert.sentences import SentenceFiles, tokenized, transformer_of
from tests.benchmark.tiny_models import words
from tests.convert.sentence_models import LIMIT, POSITIONS, save_sentence_model

st = pytest.importorskip("sentence_transformers")

TEXTS = [words(30, 1), words(5, 2), words(14, 3)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return st.SentenceTransformer(str(save_sentence_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_a_covering_window_gives_the_same_embeddings(pooling, tmp_path):
    """Texts of several lengths in one batch: padding takes no part."""
    model = st.SentenceTransformer(str(save_sentence_model(tmp_path, pooling=pooling)))
    expected = model.encode(TEXTS)
    assert to_performer(model, window=POSITIONS) is model
    assert torch.allclose(*map(torch.tensor, (model.encode(TEXTS), expected)), atol=1e-5)
    assert model.max_seq_length == LIMIT


def test_padding_takes_no_part_in_the_features(model):
    to_performer(model, num_features=16)
    together = torch.tensor(model.encode(TEXTS))
    alone = torch.cat([torch.tensor(model.encode([text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_saved_and_opened_it_gives_the_same_embeddings(model, original, tmp_path):
    to_performer(model, num_features=16, window=2, estimator="data_aware", calibration=[TEXTS])
    expected = model.encode(TEXTS)
    assert abs(expected - original.encode(TEXTS)).max() > 1e-4
    model.save(str(tmp_path / "out"))
    opened = st.SentenceTransformer(str(tmp_path / "out"))
    assert (opened.encode(TEXTS) == expected).all()
    # The transformer alone, with the pooling written out.
    inner = load_performer(tmp_path / "out")
    batch = opened.tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = inner(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    means = (states * weights).sum(1) / weights.sum(1)
    cosines = torch.cosine_similarity(means, torch.tensor(expected))
    torch.testing.assert_close(cosines, torch.ones(3))


def test_calibration_texts_are_read_as_encode_reads_them(model):
    """With the default prompt, cut at the model's maximum length."""
    model.prompts["query"], model.default_prompt_name = "w9 w8 ", "query"
    expected = []

    def keep(module, arguments):
        expected.extend(arguments)

    with transformer_of(model).get_input_embeddings().register_forward_pre_hook(keep):
        for text in TEXTS:
            model.encode(text)
    batches = tokenized(model, [[text] for text in TEXTS])
    for batch, ids in zip(batches, expected, strict=True):
        assert torch.equal(batch["input_ids"], ids)


@pytest.mark.parametrize(("limit", "length"), [(7, 7), (int(1e30), 32), (None, 32)])
def test_calibration_texts_are_cut_at_the_limit_of_the_model(original, limit, length):
    """Not at the tokenizer's, which another version of the library does not set."""
    tokenizer = copy.deepcopy(original.tokenizer)
    tokenizer.model_max_length = POSITIONS
    model = SimpleNamespace(
        tokenizer=tokenizer, max_seq_length=limit, prompts={}, default_prompt_name=None
    )
    (batch,) = tokenized(model, [words(30, 1)])
    assert batch["input_ids"].shape == (1, length)


def test_longer_texts_where_positions_allow(model):
    to_performer(model, window=POSITIONS)
    longer = [words(35, 1)]
    cut = model.encode(longer)
    model.max_seq_length = POSITIONS
    assert abs(model.encode(longer) - cut).max() > 1e-3
    assert extend_positions_(model, 100) is model
    assert model.max_seq_length == 100
    assert model.encode([words(90, 1)]).shape == (1, 24)
    assert transformer_of(model).config.max_position_embeddings == 100


def test_the_transformer_inside_is_distilled(model, original):
    to_performer(model, num_features=16)
    before = transformer_of(model).get_input_embeddings().weight.clone()
    data = [{"input_ids": torch.arange(5, 25)}] * 2
    result = distill(model, original, data, transfer_steps=1, steps=3, batch_size=2)
    assert result.finished
    assert not torch.equal(transformer_of(model).get_input_embeddings().weight, before)
    assert model.encode(TEXTS).shape == (3, 24)


def test_a_model_without_one_transformer_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    table = st.sentence_transformer.modules.StaticEmbedding(tokenizer, embedding_dim=4)
    model = st.SentenceTransformer(modules=[table])
    with pytest.raises(ValueError, match="has 0 transformers models inside"):
        to_performer(model)


def test_files_outside_of_the_folder_are_refused(tmp_path):
    folder = save_sentence_model(tmp_path / "model")
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(modules.replace("1_Pooling", "../1_Pooling"))
    with pytest.raises(ValueError, match="names a folder outside"):
        SentenceFiles.of(folder)
    (folder / "modules.json").write_text(modules.replace("models.Transformer", "models.CLIP"))
    with pytest.raises(ValueError, match="modules CLIP, Pooling, Normalize: expected one"):
        SentenceFiles.of(folder)
