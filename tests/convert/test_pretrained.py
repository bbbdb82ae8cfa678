"""Models that are saved to a folder and read back from there."""

import importlib.util
import socket

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from performers.convert.distillation.pretrained import load_model
from studies.accuracy.capture import capture_heads
from tests.benchmark.tiny_models import (
    VOCABULARY,
    bert_config,
    llama_config,
    save,
    save_bert,
    token_ids,
)


@pytest.fixture
def bert(tmp_path):
    return save_bert(tmp_path)


@pytest.fixture
def llama(tmp_path):
    return save(LlamaForCausalLM, llama_config(), tmp_path / "llama")


@pytest.mark.parametrize(
    ("name", "base", "head", "is_causal"),
    [("bert", BertModel, BertForMaskedLM, False), ("llama", LlamaModel, LlamaForCausalLM, True)],
)
def test_models_are_loaded_without_and_with_a_head(name, base, head, is_causal, request):
    folder = request.getfixturevalue(name)
    loaded, with_head = load_model(folder, head=False), load_model(str(folder))
    assert (type(loaded.model), type(with_head.model)) == (base, head)
    assert {loaded.is_causal, with_head.is_causal} == {is_causal}
    assert (loaded.tokenizer is None) is is_causal
    assert not loaded.model.training
    weights = with_head.model.base_model.state_dict()
    for name, weight in loaded.model.named_parameters():
        if "pooler" not in name:
            assert torch.equal(weight, weights[name])


def test_files_without_a_head_give_a_model_without_one(tmp_path):
    assert type(load_model(save(BertModel, bert_config(), tmp_path / "base")).model) is BertModel
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = save(ViTModel, ViTConfig(**sizes, intermediate_size=8), tmp_path / "vit")
    assert type(load_model(vit).model) is ViTModel


def test_an_encoder_turned_decoder_is_causal(tmp_path):
    folder = save(BertLMHeadModel, bert_config(is_decoder=True), tmp_path / "decoder")
    loaded = load_model(folder)
    assert type(loaded.model) is BertLMHeadModel
    assert loaded.is_causal
    assert capture_heads(loaded, token_ids(1, 7))[0].is_causal


def test_weights_are_float32_whatever_was_saved(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    loaded = load_model(tmp_path / "half")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight.float())


def test_pytorch_model_bin_is_read(bert):
    model = BertForMaskedLM.from_pretrained(bert)
    (bert / "model.safetensors").unlink()
    torch.save(model.state_dict(), bert / "pytorch_model.bin")
    loaded = load_model(bert)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, loaded.model.get_parameter(name))


def test_a_bare_vocabulary_is_found_above_the_folder_and_keeps_its_case(bert):
    tokenizer = load_model(bert).tokenizer
    assert tokenizer("A C W").input_ids == [2, 5, 6, 23, 3]
    assert tokenizer("a").input_ids == [2, 1, 3]
    (bert / "vocab.txt").write_text("\n".join([*VOCABULARY[:5], "b", "a"]))
    assert load_model(bert).tokenizer("A b").input_ids == [2, 6, 5, 3]


def test_a_saved_tokenizer_is_read(llama):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(llama)
    assert load_model(llama).tokenizer("two one").input_ids == [2, 1]


def test_nothing_asks_the_network(bert, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_model(bert).tokenizer is not None
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load_model("google-bert/bert-base-uncased")


def test_loading_leaves_the_verbosity_of_transformers_alone(bert, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(bert)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr().err == ""


def refused(error, words, path):
    with pytest.raises(error, match=words):
        load_model(path)


def test_what_cannot_be_read_is_named(bert):
    above, weights = bert.parent, bert / "model.safetensors"
    refused(FileNotFoundError, "absent: no such model folder", above / "absent")
    refused(FileNotFoundError, r"above has no config\.json", above)
    refused(ValueError, r"vocab\.txt is a file: expected a model folder", above / "vocab.txt")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(ValueError, "cannot be loaded as a transformers model", bert)
    weights.write_bytes(whole)
    bert_config(num_hidden_layers=4).save_pretrained(bert)
    refused(ValueError, "lacks .* weights of BertModel, the first of them", bert)
    (bert / "config.json").write_text("{")
    refused(ValueError, "cannot be loaded as a transformers model", bert)
    weights.unlink()
    refused(FileNotFoundError, r"has no weights \(model.safetensors or", bert)


def test_gguf_files_need_their_package_and_be_one(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    found = lambda name, *rest: None if name == "gguf" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "a.gguf"):
        refused(ImportError, r"a.gguf is a GGUF file.*pip install gguf", path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    refused(ValueError, r"2 .gguf files, a.gguf, b.gguf: name one", tmp_path)


def write_gguf(path, model, words):
    """A Llama as llama.cpp stores it: rows of query and key interleaved by halves of a head."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("context_length", 64),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("head_count", config.num_attention_heads),
        ("head_count_kv", config.num_key_value_heads),
        ("rope_dimension_count", config.head_dim),
        ("rope_freq_base", 10000.0),
        ("layer_norm_rms_eps", config.rms_norm_eps),
        ("vocab_size", config.vocab_size),
        ("tokenizer_model", "gpt2"),
        ("token_list", words),
        ("token_merges", ["a b"]),
    ):
        getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2)
            weight = weight.reshape(heads * config.head_dim, -1)
        tensor = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(tensor, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_holds_the_same_heads(tmp_path, capsys):
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(head_dim=8)).eval()
    words = ["a", "b", "ab", "Ġ", *(f"w{i}" for i in range(46))]
    write_gguf(tmp_path / "tiny.gguf", model, words)
    capsys.readouterr()
    loaded = load_model(tmp_path)
    assert capsys.readouterr().err == ""
    assert loaded.is_causal
    assert loaded.tokenizer("ab a").input_ids == [2, 3, 0]
    ids = token_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4
        )
    assert capture_heads(load_model(tmp_path / "tiny.gguf"), ids)[0].key.shape == (2, 2, 9, 8)
    # transformers refuses to train a model that it takes for quantized, and saves it as one.
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    Trainer(loaded.model, arguments)
    loaded.model.save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text()
