"""Tiny models of every architecture that converts, with random weights and sharp attention."""

import copy

import torch
import transformers

from performers.convert import to_performer

VOCABULARY = 60
WIDTH, HEADS, INNER = 32, 4, 48
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "pad_token_id": 0}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {**TEXT, **UNDROPPED}
DECODER = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**DECODER, "num_key_value_heads": 2}
PIXELS = {**SIZES, "image_size": 32, "patch_size": 8}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

# Name: (class of the model, class of the configuration, its options).
ENCODERS = {
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
    "electra": ("ElectraModel", "ElectraConfig", BERT),
    "albert": ("AlbertModel", "AlbertConfig", {**BERT, "embedding_size": 16}),
    "esm": (
        "EsmForMaskedLM",
        "EsmConfig",
        {**BERT, "mask_token_id": 4, "position_embedding_type": "rotary"},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**TEXT, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": HEADS,
            "hidden_dim": INNER,
            "vocab_size": VOCABULARY,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
}
DECODERS = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": HEADS,
            "vocab_size": VOCABULARY,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 8}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "ffn_dim": INNER,
            "vocab_size": VOCABULARY,
            "word_embed_proj_dim": WIDTH,
        },
    ),
    "bert_decoder": ("BertLMHeadModel", "BertConfig", {**BERT, "is_decoder": True}),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER,
            "num_key_value_heads": HEADS,
            "first_k_dense_replace": 2,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
        },
    ),
}
VISION = {
    "vit": ("ViTModel", "ViTConfig", PIXELS),
    "dinov2": (
        "Dinov2Model",
        "Dinov2Config",
        {name: value for name, value in PIXELS.items() if name != "intermediate_size"},
    ),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", PIXELS),
}
SPEECH = {
    "hubert": (
        "HubertModel",
        "HubertConfig",
        {
            **SIZES,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
        },
    )
}
ENCODER_DECODERS = {
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**SEQ2SEQ, "max_position_embeddings": 64},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 30,
            "max_target_positions": 40,
            "begin_suppress_tokens": None,
        },
    ),
}
ARCHITECTURES = {**ENCODERS, **DECODERS, **VISION, **SPEECH, **ENCODER_DECODERS}
# Those that take token ids and a mask of padding.
PADDED = [*ENCODERS, *DECODERS]


def sharpen(model, seed=0, deviation=0.2):
    """Weights large enough for attention to differ much from a mean over the keys."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, deviation, generator=generator)
    return model.eval()


def build(name, seed=0, **changes):
    """The original model of an architecture, in evaluation mode."""
    model_class, config_class, options = ARCHITECTURES[name]
    if name in DECODERS:
        # With tied embeddings a random model repeats its input.
        changes.setdefault("tie_word_embeddings", False)
    config = getattr(transformers, config_class)(**(options | changes))
    model = sharpen(getattr(transformers, model_class)(config), seed)
    if getattr(model, "generation_config", None) is not None:
        # Random models end early otherwise.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def token_ids(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, length), generator=generator)


def inputs(name, rows=2, length=20, seed=0):
    """Inputs of a forward call, without padding."""
    generator = torch.Generator().manual_seed(seed)
    if name in PADDED:
        return {"input_ids": token_ids(rows, length, seed)}
    if name in VISION:
        return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=generator)}
    if name in SPEECH:
        return {"input_values": torch.randn(rows, 6000, generator=generator)}
    decoder = {"decoder_input_ids": token_ids(rows, 12, seed + 1)}
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 60, generator=generator), **decoder}
    return {"input_ids": token_ids(rows, length, seed), **decoder}


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


def converted(model, **options):
    """A converted copy; the same draw every time."""
    options.setdefault("generator", torch.Generator().manual_seed(0))
    return to_performer(copy.deepcopy(model), **options)


def output(model, given, **options):
    """The main output of a model."""
    with torch.no_grad():
        result = model(**given, **options)
    return result.logits if "logits" in result else result.last_hidden_state
