"""Tiny models with random weights, saved to a folder."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from performers.convert.families.base import call_model

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *AMINO_ACIDS]


def bert_config(**changes):
    options = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,
    }
    return BertConfig(**(options | changes))


def llama_config(**changes):
    options = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(options | changes))


def save(model_class, config, folder):
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    return folder


def save_bert(above):
    """A masked language model with its vocabulary in the folder above, as AntiBERTy has it."""
    folder = save(BertForMaskedLM, bert_config(), above / "above" / "bert")
    (above / "above" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def token_ids(rows, length, vocabulary=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, vocabulary, (rows, length), generator=generator)


def identity(sample):
    """Every position attends to itself alone."""
    query, value = sample.query, sample.value
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def forward(loaded, ids, mask=None):
    with torch.no_grad():
        return call_model(
            loaded.model, input_ids=ids, attention_mask=mask, output_hidden_states=True
        )


def save_llama(folder):
    """A causal language model whose tokenizer knows the words w3 to w49."""
    save(LlamaForCausalLM, llama_config(), folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 50)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


def words(count, step):
    return " ".join(f"w{3 + (i * i * step + i // 5) % 47}" for i in range(count))


def residues(count, step):
    return "".join(AMINO_ACIDS[(i * i * step + i // 5) % 20] for i in range(count))
