"""A sentence-transformers model with random weights, as its folder is published."""

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertModel, PreTrainedTokenizerFast

from tests.benchmark.tiny_models import bert_config, save

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(3, 50))]
POSITIONS, LIMIT = 40, 24
_MODULES = ("Transformer", "Pooling", "Normalize")


def save_sentence_model(folder, *, positions=POSITIONS, limit=LIMIT, pooling="mean"):
    """Save a BERT with its tokenizer, the pooling of its states, and their normalisation."""
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": positions}
    save(BertModel, bert_config(attention_probs_dropout_prob=0.0, **sizes), folder)
    words = Tokenizer(models.WordLevel({x: i for i, x in enumerate(WORDS)}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    special = ("pad", "unk", "cls", "sep", "mask")
    names = {f"{name}_token": f"[{name.upper()}]" for name in special}
    PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=positions, **names
    ).save_pretrained(folder)
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(_MODULES)
    ]
    contents = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": limit, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None},
        "1_Pooling/config.json": {
            "word_embedding_dimension": 24,
            **{
                f"pooling_mode_{name}": name.startswith(pooling)
                for name in ("cls_token", "mean_tokens", "max_tokens")
            },
        },
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    card = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n"
    (folder / "README.md").write_text(card)
    return folder
