"""Accuracy benchmarks of tiny pretrained models, small enough for a test."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from performers.benchmark.settings import PretrainedSettings
from tests.benchmark.tiny_models import AMINO_ACIDS, llama_config, save, save_bert

TINY = {
    "length": 32,
    "window": 8,
    "sinks": 2,
    "keys": 4,
    "num_features": 16,
    "feature_counts": (8, 16),
    "repeats": 1,
    "min_time": 0.0,
    "backend": "torch",
}


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


def pretrained_settings(folder, family, **changes):
    """Settings for a model of a family, saved with its texts under a folder."""
    text, calibration = folder / "text.txt", folder / "calibration.txt"
    if family == "bert":
        model = save_bert(folder)
        text.write_text(f">one\n{residues(200, 1)}\n")
        calibration.write_text(f">one\n{residues(200, 3)}\n")
    else:
        model = save_llama(folder / "llama")
        text.write_text(words(200, 1))
        calibration.write_text(words(200, 3))
    options = {"model": str(model), "text": str(text), "calibration": str(calibration)}
    return PretrainedSettings(**(options | TINY | changes))
