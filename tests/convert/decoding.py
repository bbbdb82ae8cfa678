"""Converted decoders and what their tests of decoding share."""

from performers.convert.interface.cache import ConvertedCacheLayer
from tests.convert.architectures import DECODERS, ENCODER_DECODERS, build, converted

NEW = 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
# With and without exact terms.
KINDS = {"features": {"num_features": 16}, "exact terms": {"num_features": 16, "window": 4}}
KINDS["exact terms"]["sinks"] = 2
GENERATORS = [*DECODERS, *ENCODER_DECODERS]


def decoder(name="llama", kind="exact terms", **changes):
    return converted(build(name), **{**KINDS[kind], **changes})


def states(cache):
    cache = getattr(cache, "self_attention_cache", cache)
    return [layer for layer in cache.layers if isinstance(layer, ConvertedCacheLayer)]


def sequences(model, given, **options):
    return model.generate(**given, **(GREEDY | options))
