"""Small models with random weights of any model class of transformers.

Nothing is listed by name of a model: sizes follow from the names and defaults of a configuration's
fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

VOCABULARY = 99
MAX_PARAMETERS = 60_000_000


def model_classes(mappings: str = r"^MODEL_.*MAPPING_NAMES$") -> dict[str, str]:
    """Model classes in the auto mappings whose names match a pattern, with their model types."""
    names = [name for name in vars(modeling_auto) if re.search(mappings, name)]
    # Bare models first: the heads share their attention.
    names.sort(key=lambda name: (name != "MODEL_MAPPING_NAMES", name))
    types: dict[str, str] = {}
    for name in names:
        for model_type, classes in getattr(modeling_auto, name).items():
            for each in classes if isinstance(classes, (tuple, list)) else (classes,):
                if each:
                    types.setdefault(each, model_type)
    return types


def model_class(name: str, model_type: str) -> type[PreTrainedModel]:
    """The class of a name in the auto mappings."""
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    return getattr(module, name, None) or getattr(transformers, name)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a small configuration.

    Attributes:
        width: Every width; None: widths are divided by ``divisor``.
        layers: The least number of layers of each kind.
        image: Side of an image.
    """

    width: int | None = 32
    divisor: int = 1
    layers: int = 2
    image: int = 32

    def of(self, value: int, fixed: int) -> int:
        """A width that was ``value``, or ``fixed`` where all widths are."""
        return max(value // self.divisor, 1) if self.width is None else fixed


SIZES = (
    Sizes(),
    Sizes(layers=4, image=64),
    Sizes(layers=2, image=128),
    Sizes(width=None, divisor=16),
    Sizes(width=None, divisor=8),
    Sizes(width=None, divisor=4),
    Sizes(width=None, divisor=4, image=64),
    Sizes(width=None, divisor=2, image=64),
    Sizes(width=None),
    Sizes(width=None, image=0),
    Sizes(width=None, image=0, layers=0),
)

_TOKEN = re.compile(r"token_(id|index)s?$|_token$")
_INDICES = re.compile(r"ind(ex|ic)|feature_layer|only_layers|attention_blocks|layers_idx")
_WIDTH = (
    r"size|dim|hidden|width|d_model|d_ff|embd|channels|features|rank|units|planes|inner|filters"
    r"|ffn"
)
_LONG = re.compile(r"intermediate|ffn|inner|d_ff|mlp_dim|hidden_dim$|units")
_LEFT_ALONE = ("id2label", "label2id", "per_layer_config", "transformers_version")
_WITHOUT_DEFAULT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": 2,
    "prediction_length": 4,
    "attn_layer_indices": [1],
    "n_routed_experts": 4,
    "default_language": "en_XX",
}
# The first pattern that a field's name matches says what becomes of a number: a largest value, or
# the function of the sizes, the name and the number.
Rule = Callable[[Sizes, str, int], int]
_RULES: tuple[tuple[str, int | Rule], ...] = (
    (r"vocab", VOCABULARY),
    (
        r"(image|img|pixel)_(size|resolution)s?$|^resolution$|^crop_size$",
        lambda sizes, name, value: min(value, sizes.image or value),
    ),
    (
        r"^(patch|tubelet)_sizes?$|^patch_stride$|_patch_size$",
        lambda sizes, name, value: min(value, 8) if sizes.image else value,
    ),
    (r"(period|interval|every_n_layers|sliding_window_pattern)$", 2),
    (r"layer_offset$", 1),
    (r"shared_layers", 0),
    (
        r"^num_windows|feature_layer|feat_extract|only_layers|dense_layers|kernel|select_layer",
        2**31,
    ),
    (
        r"(layers?|blocks)$|^depths?$|_depths?$",
        lambda sizes, name, value: min(value, sizes.layers or value),
    ),
    (
        r"head_(dim|size)|d_kv|dim_head|key_value_proj_dim|d_head|kv_channels",
        lambda sizes, name, value: sizes.of(value, 16 if "mamba" in name else 8),
    ),
    (r"heads?$|heads_per_stage$", lambda sizes, name, value: _heads(sizes, value)),
    (r"topk_group", 1),
    (r"per_tok|top_?k", 2),
    (r"position|n_ctx|seq_len|max_len|context_length", 512),
    (rf"^(?!.*({_WIDTH})).*(expert|moe)", 4),
    (r"n_groups?$", 2),
    (r"window|chunk_size", lambda sizes, name, value: _window(sizes, name, value)),
    (r"num.*(quer(y|ies)|latents)", 10),
    (
        r"_groups$",
        lambda sizes, name, value: sizes.of(value, 32) if value >= 64 else value,
    ),
    (
        r"stride|dilation|ratio|factor|rate|pad|group|frame|temperature|distance|bucket|prob|loss"
        r"|coef|weight|cost|scalar|hop|mel|feature_size|theta|scale|label|num_input|fft|win|eps"
        r"|offset|version|num_class|bins|sampl|tokens_per|stft|patches|buffer|grid|seconds",
        2**31,
    ),
    (
        _WIDTH,
        lambda sizes, name, value: (
            sizes.of(value, 64 if _LONG.search(name) else 32) if value >= 48 else value
        ),
    ),
)


def _heads(sizes: Sizes, value: int) -> int:
    if sizes.width is None:
        return value
    return next((n for n in (4, 2, 1) if n <= value), value)


def _window(sizes: Sizes, name: str, value: int) -> int:
    if not sizes.image and "sliding" not in name:
        return value
    # Of patches, not of pixels, unless it is large.
    return min(value, 32 if name == "window_size" and value > 16 else 8)


class _Shrinking:
    def __init__(self, sizes: Sizes, flags: Mapping[str, Any]) -> None:
        self.sizes, self.flags = sizes, flags
        self.tokens: dict[int, int] = {}

    def config(self, default: PreTrainedConfig) -> PreTrainedConfig:
        """The same with other sizes."""
        if type(default).__name__ == "TimmBackboneConfig":
            return self._residual_network(default)
        fields = {field.name: field.default for field in dataclasses.fields(default)}
        fields = {name: value for name, value in fields.items() if name not in _LEFT_ALONE}
        values = {name: _read(default, name) for name in fields}
        changes = self._layer_lists(values)
        with contextlib.suppress(TypeError, ValueError):
            # The configuration around this one sets other values than its class.
            fresh = type(default)()
            given = {name for name in fields if _read(fresh, name) != values[name]}
            fields |= dict.fromkeys(given, "given")
        for name, value in values.items():
            if name in changes:
                continue
            if isinstance(value, PreTrainedConfig):
                changes[name] = self.config(value)
            elif value is None:
                if (given := self._missing(name)) is not None:
                    changes[name] = given
            elif isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
                small = self._value(name, value, values)
                derived = fields[name] is None and not _TOKEN.search(name)
                if (small != value and not derived) or fields[name] == "given":
                    changes[name] = small
            elif isinstance(value, float) and "drop" in name:
                changes[name] = 0.0
            elif fields[name] == "given":
                changes[name] = value
        if "out_indices" in changes:
            changes.pop("out_features", None)
        changes |= {name: value for name, value in self.flags.items() if name in fields}
        if (rotary := self._rotary_sections(default, {**values, **changes})) is not None:
            changes["rope_parameters"] = rotary
        made = type(default)(**changes)
        types = getattr(made, "layer_types", ()) if "layer_types" in fields else ()
        if types is None:
            types = ["full_attention"] * made.num_hidden_layers
        elif types and all("linear" in each or "attention" not in each for each in types):
            # So few layers have none with attention.
            types = [*types[:-1], "full_attention"]
        if types != getattr(made, "layer_types", ()) and types:
            made = type(default)(**{**changes, "layer_types": types})
        return made

    def _residual_network(self, default: PreTrainedConfig) -> PreTrainedConfig:
        """A backbone of transformers in the place of one from timm, which is not installed."""
        indices = getattr(default, "out_indices", None) or [4]
        wide = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
        return ResNetConfig(**wide, out_features=[f"stage{min(max(i, 1), 4)}" for i in indices])

    def _missing(self, name: str) -> Any:
        """Values that have no default."""
        if _TOKEN.search(name) and re.search("image|video|audio", name):
            return self._token(10_000 + len(self.tokens))
        if name == "vocabulary_map":
            return {"<image>": self._token(20_000)}
        return _WITHOUT_DEFAULT.get(name)

    def _rotary_sections(
        self, default: PreTrainedConfig, values: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Rotary parameters whose sections sum to half of the rotated width."""
        rotary = values.get("rope_parameters")
        if not isinstance(rotary, dict) or "rope_theta" not in rotary:
            return None
        sections = rotary.get("mrope_section")
        if sections is None:
            if "mrope_section" not in _modelling_text(type(default)):
                return None
            sections = [16, 24, 24]
        width = values.get("qk_rope_head_dim") or values.get("head_dim")
        heads = values.get("num_attention_heads") or values.get("num_heads")
        if not width and not (heads and values.get("hidden_size")):
            return None
        width = width or values["hidden_size"] // heads
        half = int(width * rotary.get("partial_rotary_factor", 1.0)) // 2
        cut = [half * each // sum(sections) for each in sections]
        # Two of the three are one width.
        cut[min(range(len(sections)), key=lambda i: sections.count(sections[i]))] += half - sum(cut)
        return {**rotary, "mrope_section": cut}

    def _layer_lists(self, values: dict[str, Any]) -> dict[str, Any]:
        """Fewer layers, of every kind that lists over the layers tell apart."""
        main = next(
            (n for n in ("num_hidden_layers", "n_layer", "num_layers") if values.get(n)), None
        )
        if main is None or not self.sizes.layers:
            return {}
        count = values[main]
        if (pattern := values.get("block_types")) and len(pattern) < count:
            return {main: max(len(pattern), self.sizes.layers)}
        if pattern := values.get("attention_types"):
            return {main: len(pattern[0][0]), "attention_types": [[pattern[0][0], 1]]}
        lists = {
            name: list(value)
            for name, value in values.items()
            if isinstance(value, (list, tuple)) and len(value) == count > self.sizes.layers
        }
        if not lists:
            return {}
        chosen: list[int] = []
        seen: set[str] = set()
        for index in range(count):
            kind = repr([each[index] for each in lists.values() if len(set(map(str, each))) < 8])
            if kind not in seen and len(chosen) < 6:
                seen.add(kind)
                chosen.append(index)
        while len(chosen) < self.sizes.layers:
            chosen.append(next(i for i in range(count - 1, -1, -1) if i not in chosen))
        chosen.sort()
        cut = {name: [each[i] for i in chosen] for name, each in lists.items()}
        return {main: len(chosen), **cut}

    def _value(self, name: str, value: Any, values: dict[str, Any]) -> Any:
        if isinstance(value, (list, tuple)):
            if not all(isinstance(each, int) for each in value) or not value:
                return value
            if _INDICES.search(name) and (len(value) == 1 or len(set(value)) > 1):
                return self._indices(name, value, values)
            return type(value)(self._number(name, each, values) for each in value)
        return self._number(name, value, values)

    def _indices(self, name: str, value: Any, values: dict[str, Any]) -> Any:
        """Indices of layers that there still are."""
        layers = self.sizes.layers
        if not layers or max(map(abs, value)) <= layers:
            return value
        stages = [values.get(each) for each in ("depths", "hidden_sizes", "stage_in_channels")]
        if any(isinstance(each, (list, tuple)) and len(each) >= max(value) for each in stages):
            return value
        if name == "out_indices":
            count = min(len(value), layers)
            return type(value)(layers - count + 1 + i for i in range(count))
        if "feature_layer" in name:
            return type(value)(max(i, -2) if i < 0 else min(i, layers - 1) for i in value)
        return type(value)(sorted({min(i, layers - 1) for i in range(1, len(value) + 1)}))

    def _token(self, value: int) -> int:
        return self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens))

    def _number(self, name: str, value: int, values: dict[str, Any]) -> int:
        if _TOKEN.search(name):
            return value if value < 5 else self._token(value)
        if re.search(r"(key_value|kv)_heads", name) and self.sizes.width is not None:
            heads = max(values.get(n) or 0 for n in ("num_attention_heads", "num_heads", "n_head"))
            return 1 if value == 1 else 4 if value >= heads else 2
        for pattern, rule in _RULES:
            if re.search(pattern, name):
                return min(value, rule) if isinstance(rule, int) else rule(self.sizes, name, value)
        return value


def _read(config: PreTrainedConfig, name: str) -> Any:
    # Some attributes refuse to be read where they differ from layer to layer.
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


def _modelling_text(config_class: type[PreTrainedConfig]) -> str:
    folder = Path(inspect.getfile(config_class)).parent
    return "".join(path.read_text() for path in sorted(folder.glob("modeling_*.py")))


def small_model(
    kind: type[PreTrainedModel],
    sizes: Sizes,
    *,
    sharp: bool = True,
    seed: int = 0,
    flags: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A model with random weights, sharp or as initialised, in evaluation mode."""
    config = _Shrinking(sizes, flags or {}).config(kind.config_class())
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = kind(config).float().eval()
    if sharp:
        sharpen(model, seed)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = generation.forced_eos_token_id = None
        generation.pad_token_id = 0
        if generation.bos_token_id is None:
            generation.bos_token_id = 1
    return model


def sharpen(model: nn.Module, seed: int = 0, scale: float = 1.2) -> nn.Module:
    """Random weights whose attention differs much from a mean over the keys, no zero biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.copy_(noise * min(0.25 * scale, scale * max(fan, 1) ** -0.5))
            elif parameter.ndim == 1:
                parameter.add_(0.1 * noise)
    return model
