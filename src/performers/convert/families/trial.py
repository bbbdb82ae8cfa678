"""Trial of a model before its conversion, on inputs made up from its configuration.

The code of a model can do to its attention what no attribute tells: add a bias to the scores, take
the mask apart, call an attention module with other keys than queries. The trial finds it, so that
`to_performer` refuses the model before anything changes.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from performers.convert.families.base import Site, pre_hooks
from performers.convert.fitting import evaluation
from performers.convert.interface.cache import check_cache, find_cache
from performers.convert.interface.call import AttentionCall, check_linear, exact_attention
from performers.convert.interface.implementation import intercept_attention
from performers.convert.interface.masks import check_reading
from performers.convert.options import LEAVE_EXACT

_ROWS, _LENGTH = 2, 12
_TOLERANCE = 1e-3


def try_model(model: Any, sites: Sequence[Site]) -> set[Site]:
    """Run a model with exact attention through the interface and check the calls of its layers.

    The outputs must equal those of the unchanged model. Layers that the model does not call on the
    inputs that suit it are tried with the models within it; those that no inputs reach remain
    unchecked. Returns the layers that were called.
    """
    with evaluation(model), torch.random.fork_rng():
        called = _try_inputs(model, sites)
    left = [site for site in sites if site not in called]
    for inner in _inner_models(model) if left else ():
        inside = set(inner.modules())
        if own := [site for site in left if site.module in inside]:
            called |= try_model(inner, own)
    return called


def _inner_models(module: nn.Module) -> Iterator[Any]:
    """Find the largest transformers models within a module."""
    for child in module.children():
        if isinstance(child, PreTrainedModel):
            yield child
        else:
            yield from _inner_models(child)


def _try_inputs(model: Any, sites: Sequence[Site]) -> set[Site]:
    """Check a model on the first inputs that it accepts; returns the sites that it calls."""
    device = next(model.parameters(), torch.empty(0)).device
    for candidate in _candidates(model):
        inputs = {name: value.to(device) for name, value in candidate.items()}
        expected = outputs_of(model, inputs)
        if expected is None:
            continue
        called = _compare(model, sites, inputs, expected)
        if "attention_mask" in inputs:
            # Without padding transformers may leave the mask to the attention itself.
            unmasked = {name: x for name, x in inputs.items() if name != "attention_mask"}
            expected = outputs_of(model, unmasked)
            if expected is not None:
                _compare(model, sites, unmasked, expected)
        return called
    return set()


def _compare(
    model: Any, sites: Sequence[Site], inputs: Mapping[str, Tensor], expected: list[Tensor]
) -> set[Site]:
    kind = type(model).__name__
    running: set[nn.Module] = set()
    called: set[Site] = set()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.discard(module)
        cache, index = find_cache(args, kwargs), getattr(module, "layer_idx", None)
        if cache is not None and isinstance(index, int):
            check_cache(cache, index)

    def observe(site: Site, call: AttentionCall) -> Tensor:
        if site.module in running and not site.is_cross:
            raise ValueError(
                f"{site.name} ({call.name}) attends more than once in a forward pass, for "
                f"which a cache has one state: {LEAVE_EXACT}"
            )
        running.add(site.module)
        called.add(site)
        check_linear(call)
        check_reading(call.pattern, site.name)
        _check_heads(site, call)
        return exact_attention(call)

    hooks = {site.module: enter for site in sites if not site.is_cross}
    functions = {site.module: functools.partial(observe, site) for site in sites}
    try:
        with pre_hooks(hooks), intercept_attention(functions, model):
            outputs = _tensors(model(**inputs))
    except (TypeError, AttributeError, RuntimeError, IndexError, KeyError) as error:
        raise ValueError(
            f"{kind} computes with its attention masks itself, which linear attention never "
            f"forms ({type(error).__name__}: {error}): it cannot be converted"
        ) from error
    # Some models draw random numbers in evaluation too.
    if not close(outputs, expected) and close(outputs_of(model, inputs) or [], expected):
        raise ValueError(
            f"{kind} computes something else when its attention goes through the attention "
            "interface of transformers: it cannot be converted"
        )
    return called


def _check_heads(site: Site, call: AttentionCall) -> None:
    where = f"{site.name} ({call.name})"
    length, size = call.query.shape[2], call.key.shape[2]
    if length != size and not site.is_cross:
        raise ValueError(
            f"{where} attends from {length} queries to {size} other keys, so that it is no "
            f"self-attention: {LEAVE_EXACT}"
        )
    heads, width = call.key.shape[1], call.query.shape[-1]
    if (heads, width) != (site.key_heads, site.head_dim):
        raise ValueError(
            f"{where} has {heads} heads of width {width} in its keys, but its attributes say "
            f"{site.key_heads} of {site.head_dim}: {LEAVE_EXACT}"
        )


def outputs_of(model: Callable[..., Any], inputs: Mapping[str, Any]) -> list[Tensor] | None:
    """Floating-point outputs of a model; None: it does not accept the inputs."""
    try:
        return _tensors(model(**inputs)) or None
    # Made-up inputs may raise anything, which says nothing about the conversion.
    except Exception:
        return None


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = [value for name, value in output.items() if "attentions" not in name]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


def close(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    """Equality of outputs with those expected, to rounding."""
    if [x.shape for x in outputs] != [x.shape for x in expected]:
        return False
    for x, y in zip(outputs, expected, strict=True):
        a, b = x.double(), y.double()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = (a - b).masked_fill(same, 0.0)
        size = b.nan_to_num(0.0, 0.0, 0.0).norm()
        # Half precision rounds by more than a wrong mask changes.
        bound = _TOLERANCE if y.itemsize > 2 else 0.1
        if not bool(difference.norm() <= bound * size + 1e-6):
            return False
    return True


def find(config: Any, *names: str, default: Any = None) -> Any:
    """Find the first of some attributes in a configuration or those within it."""
    queue = [config]
    for part in queue:
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
        queue += [x for x in vars(part).values() if isinstance(x, PreTrainedConfig)]
    return default


def _candidates(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs to try, those with most kinds of data first."""
    config, names = model.config, set(inspect.signature(type(model).forward).parameters)
    dtype = next(model.parameters(), torch.empty(0)).dtype
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    ids = token_ids(config, random)
    text: dict[str, Tensor] = {}
    if "input_ids" in names:
        text["input_ids"] = ids
        if "attention_mask" in names:
            mask = torch.ones_like(ids)
            mask[1, -3:] = 0
            text["attention_mask"] = mask
        if "bbox" in names:
            corner = torch.randint(0, 8, (_ROWS, _LENGTH, 2), generator=random)
            text["bbox"] = torch.cat((corner, corner + 3), -1)
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in names else {}
    for other in _other_data(config, names, normal):
        for placed in _placeholders(config, text, other):
            yield {**placed, **other, **decoder}
        yield from ({**text, **other, **decoder}, {**other, **decoder}, other)
    if text:
        yield from ({**text, **decoder}, text, {"input_ids": ids})
    width = find(config, "hidden_size", "d_model", default=32)
    for name in {"inputs_embeds", "hidden_states"} & names:
        yield {name: normal(_ROWS, _LENGTH, width)}


def token_ids(config: Any, random: torch.Generator) -> Tensor:
    """Token ids, none of them special in the configuration."""
    vocabulary = find(config, "vocab_size", default=32)
    parts = [config, *(x for x in vars(config).values() if isinstance(x, PreTrainedConfig))]
    special = {
        value
        for part in parts
        for name, value in vars(part).items()
        if isinstance(value, int) and ("token" in name or name.endswith("_id"))
    }
    ordinary = [x for x in range(min(vocabulary, 1000)) if x not in special] or [0]
    chosen = torch.randint(len(ordinary), (_ROWS, _LENGTH), generator=random)
    return torch.tensor(ordinary)[chosen]


def _placeholders(
    config: Any, text: dict[str, Tensor], other: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Insert as many placeholders of an image into the text as the model may expect."""
    token = find(config, "image_token_id", "image_token_index")
    pixels = other.get("pixel_values")
    if token is None or pixels is None or "input_ids" not in text or len(pixels) != _ROWS:
        return
    vision = getattr(config, "vision_config", None) or config
    patch = find(vision, "patch_size", default=8)
    cells = pixels[0].numel() // (pixels.shape[-3] if pixels.ndim > 3 else 1) // patch**2
    resampled = find(config, "image_seq_length", "resampler_n_latents", default=cells)
    ids, mask = text["input_ids"], text.get("attention_mask")
    for count in dict.fromkeys((cells, resampled, cells + 1, cells // 4, cells // 16)):
        marks = ids.new_full((_ROWS, count), token)
        inputs = {"input_ids": torch.cat((ids[:, :2], marks, ids[:, 2:]), 1)}
        if mask is not None:
            inputs["attention_mask"] = torch.cat((torch.ones_like(marks), mask), 1)
        yield inputs


def _other_data(
    config: Any, names: set[str], normal: Callable[..., Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Images, sounds and time series."""
    vision = getattr(config, "vision_config", None) or config
    size = find(vision, "image_size", "img_size", "input_image_size", default=32)
    if isinstance(size, dict):
        size = (size.get("height", 32), size.get("width", 32))
    height, width = (size[0], size[-1]) if isinstance(size, (list, tuple)) else (size, size)
    channels = find(vision, "num_channels", "in_channels", "in_chans", default=3)
    patch = find(vision, "patch_size", default=8)
    numbers = all(isinstance(x, int) for x in (height, width, channels, patch))
    if "pixel_values" in names and numbers:
        if {"spatial_shapes", "pixel_attention_mask"} <= names:
            yield {
                "pixel_values": normal(_ROWS, 16, channels * patch * patch),
                "spatial_shapes": torch.tensor([[4, 4]] * _ROWS),
                "pixel_attention_mask": torch.ones(_ROWS, 16, dtype=torch.int64),
            }
        frames = find(config, "num_frames", default=2)
        for shape in ((1,), (_ROWS,), (_ROWS, frames), (_ROWS, 1)):
            yield {"pixel_values": normal(*shape, channels, height, width)}
    widths = "num_mel_bins input_feat_per_channel feature_projection_input_dim n_mels mel_dim"
    mel = find(config, *widths.split(), default=80)
    if "input_features" in names:
        source = find(config, "max_source_positions", default=50)
        for shape in ((mel, 2 * source), (64, mel), (64, 4 * mel)):
            yield {"input_features": normal(_ROWS, *shape)}
        ones = torch.ones(_ROWS, 64, dtype=torch.int64)
        yield {"input_features": normal(_ROWS, 64, mel), "attention_mask": ones}
    if "input_values" in names:
        yield {"input_values": normal(_ROWS, 6000)}
        yield {"input_values": normal(_ROWS, find(config, "max_length", default=64), mel)}
    length = find(config, "context_length", default=32)
    for axes in ((length,), (length, 1)) if "past_values" in names else ():
        inputs = {
            "past_values": normal(_ROWS, *axes),
            "past_values_padding": torch.zeros(_ROWS, *axes, dtype=torch.int64),
            "freq": torch.zeros(_ROWS, 1, dtype=torch.int64),
        }
        yield {name: value for name, value in inputs.items() if name in names}
