"""The models that the tests of conversion share: small, with random weights and sharp attention."""

import copy
import functools

import pytest
import torch
import transformers
from torch import nn

from performers.convert import to_performer
from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerModel,
)
from performers.models.arguments import CACHE_KEYWORD
from performers.nn import FavorAttention
from tests.convert.small_inputs import Inputs, with_placeholders
from tests.convert.small_models import SIZES, VOCABULARY, sharpen, small_model

WIDTH, HEADS, HEAD_DIM = 32, 4, 8
# A window over every input here: exact attention, whatever the features.
COVERING = 64
KINDS = {
    "features": {"num_features": 16},
    "exact terms": {"num_features": 16, "window": 4, "sinks": 2},
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

# A class, and values of its configuration other than those of small_models.
GROUPED = {"num_key_value_heads": 2, "tie_word_embeddings": False}
# With tied embeddings a random decoder repeats its input.
UNTIED = {"tie_word_embeddings": False}
ENCODERS = {
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "electra": ("ElectraModel", {}),
    "albert": ("AlbertModel", {}),
    "esm": (
        "EsmForMaskedLM",
        {"mask_token_id": 4, "pad_token_id": 1, "position_embedding_type": "rotary"},
    ),
    "modernbert": ("ModernBertForMaskedLM", {"local_attention": 8}),
    "distilbert": ("DistilBertForMaskedLM", {}),
}
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", UNTIED),
    "gpt_neox": ("GPTNeoXForCausalLM", UNTIED),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "gemma": ("GemmaForCausalLM", GROUPED),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "opt": ("OPTForCausalLM", UNTIED),
    "bert_decoder": ("BertLMHeadModel", {**UNTIED, "is_decoder": True}),
    "deepseek": ("DeepseekV3ForCausalLM", UNTIED),
}
OTHERS = {
    "vit": ("ViTModel", {}),
    "dinov2": ("Dinov2Model", {}),
    "clip_vision": ("CLIPVisionModel", {}),
    "hubert": ("HubertModel", {"layerdrop": 0.0}),
    "bart": ("BartForConditionalGeneration", {}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "num_mel_bins": 8,
            "max_source_positions": 30,
            "max_target_positions": 256,
            "begin_suppress_tokens": None,
        },
    ),
    "llava": ("LlavaForConditionalGeneration", GROUPED),
}
TRANSFORMERS = {**ENCODERS, **DECODERS, **OTHERS}
# The library's own models, with exact attention.
PERFORMERS = {
    "performer": PerformerModel,
    "performer_masked": PerformerForMaskedLM,
    "performer_causal": PerformerForCausalLM,
    "performer_classifier": PerformerForSequenceClassification,
}
TORCH = ["torch_encoder", "torch_decoder", "torch_transformer"]
ALL = [*TRANSFORMERS, *PERFORMERS, *TORCH]
# Classes whose attention is that of others; tests of what is the same in all leave them out.
_ALIKE = {"electra", "clip_vision", "dinov2", "mistral", "qwen2", "gemma", "phi3"}
# Those that take token ids and a mask of padding.
PADDED = [*ENCODERS, *DECODERS, "performer_masked", "performer_causal"]
CAUSAL = [*DECODERS, "performer_causal"]
GENERATORS = [*DECODERS, "bart", "whisper"]


def tried(*names):
    """Values to parametrize with, behind ``-m exhaustive`` for models that others stand for."""
    rest = pytest.mark.exhaustive
    return [pytest.param(name, marks=rest) if name in _ALIKE else name for name in names]


def performer(kind=PerformerForMaskedLM, **changes):
    """One of the library's own models with exact attention."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": HEADS, "intermediate_size": 48, "hidden_dropout_prob": 0.0}
    sizes |= {"attention": "exact", "tie_word_embeddings": False, "max_position_embeddings": 128}
    return sharpen(kind(PerformerConfig(**(sizes | changes))).eval())


def torch_model(name="torch_encoder", layers=2, **options):
    """A stack of torch's own layers, with random biases."""
    options = {"dropout": 0.0, "batch_first": True, **options}
    if name == "torch_transformer":
        model = nn.Transformer(WIDTH, HEADS, 1, layers, 48, **options)
    elif name == "torch_decoder":
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 48, **options)
        model = nn.TransformerDecoder(layer, layers)
    else:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, **options)
        model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return sharpen(model.eval())


class Wrapped(nn.Module):
    """A module of somebody's own around torch's attention."""

    def __init__(self, width=WIDTH, heads=HEADS, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, **{"batch_first": True, **options})
        sharpen(self)

    def forward(self, query, key=None, value=None, **options):
        key = query if key is None else key
        return self.attention(query, key, key if value is None else value, **options)[0]


def small(class_name, seed=0, **changes):
    """A model of any class of transformers."""
    kind = getattr(transformers, class_name)
    return small_model(kind, SIZES[0], seed=seed, flags=changes)


@functools.cache
def _built(name, seed):
    return build(name, seed, cached=False)


def build(name, seed=0, *, cached=True, **changes):
    """The original model of a name, in evaluation mode."""
    if cached and not changes:
        return copy.deepcopy(_built(name, seed))
    if name in PERFORMERS:
        return sharpen(performer(PERFORMERS[name], **changes), seed)
    if name in TORCH:
        return sharpen(torch_model(name, **changes), seed)
    class_name, options = TRANSFORMERS[name]
    return small(class_name, seed, **(options | changes))


def inputs(name, rows=2, length=20, seed=0):
    """Inputs of a forward call, without padding."""
    if name in TORCH:
        memory = {"torch_decoder": ["memory"], "torch_transformer": ["src"]}
        source = [] if name == "torch_encoder" else memory[name]
        target = ["src" if name == "torch_encoder" else "tgt"]
        random = torch.Generator().manual_seed(seed)
        sizes = [(each, length) for each in target] + [(each, 9) for each in source]
        return {each: torch.randn(rows, n, WIDTH, generator=random) for each, n in sizes}
    model = _built(name, 0)
    given = next(Inputs(model, rows, length, seed).candidates())
    if name == "llava":
        given = with_placeholders(model.config, given, 16)
        del given["image_sizes"]
    return given


def token_ids(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 70, (rows, length), generator=generator)


def generation_inputs(name, rows=2, length=12, seed=0):
    """Inputs of ``generate``: no tokens for an encoder-decoder to begin with."""
    given = inputs(name, rows, length, seed)
    return {key: value for key, value in given.items() if key != "decoder_input_ids"}


def padding_mask(rows, length, side, count=7):
    """(rows, length): the last row begins or ends with padding."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    if side == "left":
        mask[-1, :count] = 0
    elif side == "right":
        mask[-1, -count:] = 0
    return mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def converted(model, **options):
    """A converted copy; the same draw every time."""
    options.setdefault("generator", seeded())
    return to_performer(copy.deepcopy(model), **options)


@functools.cache
def linear(name, **options):
    """The converted model of a name, which tests share and leave as it is."""
    return to_performer(build(name), generator=seeded(), **options)


def main_output(result):
    """The tensor among a model's outputs that its attention decides."""
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if "logits" in result else result.last_hidden_state


def output(model, given, **options):
    with torch.no_grad():
        return main_output(model(**given, **options))


def step(model, ids, cache=None, **options):
    """Logits and cache of a call that continues a cache."""
    with torch.no_grad():
        result = model(ids, use_cache=True, **{CACHE_KEYWORD: cache}, **options)
    return result.logits, getattr(result, CACHE_KEYWORD)


def favors(model):
    """The converted attention modules of a model."""
    return [x for x in model.modules() if isinstance(x, FavorAttention)]
