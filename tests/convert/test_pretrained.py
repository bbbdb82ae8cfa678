"""Models that are saved to a folder and read back from there."""

import importlib.util
import socket

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
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


def test_an_encoder_is_loaded_without_and_with_its_head(bert):
    loaded = load_model(bert)
    assert type(loaded.model) is BertModel
    assert not loaded.model.training
    assert (loaded.is_causal, loaded.has_head, loaded.max_length) == (False, False, 40)
    with_head = load_model(str(bert), head=True)
    assert type(with_head.model) is BertForMaskedLM
    assert with_head.has_head
    assert not with_head.is_causal
    for name, weight in loaded.model.named_parameters():
        if "pooler" not in name:
            assert torch.equal(weight, with_head.model.bert.get_parameter(name))


def test_a_decoder_is_loaded_without_and_with_its_head(llama):
    loaded, with_head = load_model(llama), load_model(llama, head=True)
    assert type(loaded.model) is transformers.LlamaModel
    assert type(with_head.model) is LlamaForCausalLM
    assert loaded.is_causal
    assert with_head.is_causal
    assert loaded.max_length is None
    assert loaded.tokenizer is None


def test_an_encoder_turned_decoder_is_causal(tmp_path):
    config = bert_config(is_decoder=True)
    folder = save(transformers.BertLMHeadModel, config, tmp_path / "decoder")
    loaded = load_model(folder, head=True)
    assert type(loaded.model) is transformers.BertLMHeadModel
    assert loaded.is_causal
    assert capture_heads(loaded, token_ids(1, 7))[0].is_causal


def test_weights_are_float32_whatever_was_saved(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    loaded = load_model(tmp_path / "half", head=True)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight.float())


def test_pytorch_model_bin_is_read(bert):
    model = BertForMaskedLM.from_pretrained(bert)
    (bert / "model.safetensors").unlink()
    torch.save(model.state_dict(), bert / "pytorch_model.bin")
    loaded = load_model(bert, head=True)
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


def test_missing_files_are_named(bert, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such model folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"above has no config\.json"):
        load_model(tmp_path / "above")
    with pytest.raises(ValueError, match=r"vocab\.txt is a file: expected a model folder"):
        load_model(tmp_path / "above" / "vocab.txt")
    (bert / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights \(model.safetensors or"):
        load_model(bert)


def test_unreadable_weights_are_named(bert):
    whole = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be loaded as a transformers model"):
        load_model(bert)
    (bert / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded as a transformers model"):
        load_model(bert)


def test_a_head_that_was_not_saved_is_refused(tmp_path):
    folder = save(BertModel, bert_config(), tmp_path / "base")
    load_model(folder)
    with pytest.raises(ValueError, match=r"lacks .* weights of BertForMaskedLM.*use head=False"):
        load_model(folder, head=True)


def test_a_model_without_language_modelling_is_refused(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    folder = save(transformers.ViTModel, config, tmp_path / "vit")
    with pytest.raises(ValueError, match="a vit, for which transformers has no language-modelling"):
        load_model(folder, head=True)


def test_gguf_files_need_their_package_and_be_one(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gguf" else find_spec(name, *rest),
    )
    for path in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(ImportError, match=r"a.gguf is a GGUF file.*pip install gguf"):
            load_model(path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"2 .gguf files, a.gguf, b.gguf: name one"):
        load_model(tmp_path)


def write_gguf(path, model, words):
    """A Llama as llama.cpp stores it: rows of query and key interleaved by halves of a head."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
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
    loaded = load_model(tmp_path, head=True)
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


def test_a_head_is_read_where_there_is_one(bert, tmp_path):
    assert type(load_model(bert, head=None).model) is BertForMaskedLM
    assert load_model(bert, head=None).has_head
    base = load_model(save(BertModel, bert_config(), tmp_path / "base"), head=None)
    assert type(base.model) is BertModel
    assert not base.has_head
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    assert not load_model(save(transformers.ViTModel, config, tmp_path / "vit"), head=None).has_head
    deeper = bert_config(num_hidden_layers=4)
    deeper.save_pretrained(bert)
    with pytest.raises(ValueError, match=r"lacks .* weights of BertModel, the first of them"):
        load_model(bert, head=None)
