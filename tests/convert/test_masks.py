"""Masks of transformers, taken apart; exact attention under them, in blocks where it is local."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, BertConfig, DynamicCache, LlamaConfig, MistralConfig
from transformers import masking_utils as utils

import performers.convert  # noqa: F401  (registers "favor")
from performers.models.arguments import CACHE_KEYWORD
from tests.convert.models import build, converted, token_ids
from tests.models.memory import HeldBytes

LENGTH = 9
KINDS = {
    "causal": (utils.create_causal_mask, LlamaConfig, {}),
    "sliding": (utils.create_sliding_window_causal_mask, MistralConfig, {"sliding_window": 3}),
    "chunked": (utils.create_chunked_causal_mask, LlamaConfig, {"attention_chunk_size": 3}),
    "bidirectional": (utils.create_bidirectional_mask, BertConfig, {}),
    "bidirectional sliding": (
        utils.create_bidirectional_sliding_window_mask,
        BertConfig,
        {"sliding_window": 2},
    ),
}
PADDING = {
    "none": None,
    "nothing": torch.ones(2, LENGTH, dtype=torch.int64),
    "left": torch.tensor([[1] * LENGTH, [0] * 4 + [1] * 5]),
    "right": torch.tensor([[1] * 6 + [0] * 3, [1] * LENGTH]),
}


def make(kind, implementation="favor", mask=None, length=LENGTH, cache=None, settings=None, **more):
    """Mask that transformers hands to the attention of a model."""
    function, config_class, options = KINDS[kind]
    config = config_class(**(settings or options), attn_implementation=implementation)
    if "bidirectional" in kind:
        more.pop("position_ids", None)
    embedded = torch.zeros(2, length, 4)
    more[CACHE_KEYWORD] = cache
    return function(config=config, inputs_embeds=embedded, attention_mask=mask, **more)


def described(pattern, length=LENGTH):
    """The dense mask of what a pattern says, (2, 1, L, L)."""
    assert pattern.unknown is None
    i, j = torch.arange(length).unsqueeze(-1), torch.arange(length)
    seen = torch.ones(1, length, length, dtype=torch.bool)
    if pattern.is_causal:
        seen = seen & (j <= i)
    if pattern.window is not None:
        seen = seen & ((i - j).abs() <= pattern.window)
    if pattern.key_mask is not None:
        seen = seen & pattern.key_mask.unsqueeze(1)
    if pattern.sequence_ids is not None:
        ids = pattern.sequence_ids
        seen = seen & (ids.unsqueeze(-1) == ids.unsqueeze(1))
    return seen.unsqueeze(1).expand(2, 1, length, length)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", [x for x in KINDS if x != "chunked"])
def test_patterns_say_what_dense_masks_say(kind, padding, packed):
    positions = None
    if packed:
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 0, 1, 2, 3, 4]])
    pattern, eager = (
        make(kind, x, PADDING[padding], position_ids=positions) for x in ("favor", "eager")
    )
    dense = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool) if eager is None else eager == 0
    assert torch.equal(described(pattern), dense.expand(2, 1, LENGTH, LENGTH))
    # The mask that exact layers get.
    exact = pattern.dense()
    if exact is None:
        exact = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        exact = exact.tril() if pattern.is_causal else exact
    assert torch.equal(exact.expand(2, 1, LENGTH, LENGTH), described(pattern))
    assert pattern.shape == (2, 1, LENGTH, LENGTH)
    assert pattern.ndim == 4
    if padding == "nothing":
        assert pattern.key_mask is None


def beside(batch, head, query, key):
    return (query - key).abs() == 1


class Triangle:
    def __call__(self, batch, head, query, key):
        return key <= query


def and_masks(*functions):
    """Not the function of that name in transformers."""

    def and_mask(batch, head, query, key):
        return functions[0](batch, head, query, key)

    return and_mask


BLOCKS = {"block_sequence_ids": torch.tensor([[-1, 0, 0, 0, -1, -1, -1, -1, -1]]).expand(2, -1)}
UNKNOWN = {
    **{
        f"{kind} {option}": (kind, {option: beside}, "a mask of its own")
        for kind in ("causal", "sliding", "bidirectional")
        for option in ("or_mask_function", "and_mask_function")
    },
    "blocks that see their future": ("causal", BLOCKS, ""),
    "chunks": ("chunked", {}, "chunked_overlay"),
    "a familiar name": ("causal", {"and_mask_function": and_masks(beside)}, "a mask of its own"),
    "a callable object": ("causal", {"and_mask_function": Triangle()}, "a mask of its own"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_functions_of_the_models_own_are_not_guessed(name):
    """Linear layers refuse them, exact ones get the dense mask."""
    kind, options, words = UNKNOWN[name]
    pattern = make(kind, **options)
    assert words in pattern.unknown
    assert pattern.dense() is pattern.dense()
    assert torch.equal(pattern.dense(), make(kind, "sdpa", **options))


def test_a_pattern_that_is_passed_on_stays_as_it_is():
    pattern = make("causal", mask=PADDING["left"])
    assert make("sliding", mask=pattern) is pattern
    assert pattern.contiguous() is pattern


def test_masks_follow_the_queries_to_their_device():
    pattern = make("causal", mask=PADDING["left"])
    assert pattern.on(torch.device("meta")).key_mask.device.type == "meta"
    assert pattern.on(torch.device("cpu")).key_mask is pattern.key_mask
    assert pattern.key_mask.device.type == "cpu"


def filled_cache(length=4):
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, length, 4), torch.zeros(2, 1, length, 4), 0)
    return cache


def test_masks_of_a_call_that_continues():
    mask = torch.ones(2, LENGTH + 4, dtype=torch.int64)
    mask[1, :2] = 0
    pattern = make("causal", mask=mask, cache=filled_cache())
    assert torch.equal(pattern.key_mask, mask.bool())
    assert torch.equal(pattern.dense(), make("causal", "sdpa", mask, cache=filled_cache()))
    # Of the call's own tokens: enough for linear layers alone.
    pattern = make("causal", mask=PADDING["right"], cache=filled_cache())
    assert torch.equal(pattern.key_mask, PADDING["right"].bool())
    with pytest.raises(ValueError, match="one for each of the 13 tokens so far"):
        pattern.dense()
    with pytest.raises(ValueError, match="must cover the 13 tokens so far, or the 9"):
        make("causal", mask=torch.ones(2, 5), cache=filled_cache())


def test_packed_sequences_and_a_cache_are_refused():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]] * 2)
    pattern = make("causal", position_ids=positions)
    with pytest.raises(ValueError, match="a cache together with packed sequences"):
        converted(build("llama"))(token_ids(2, 9), attention_mask=pattern, use_cache=True)


# ------------------------------------------------------------------- exact attention in blocks


def tensors(length, heads=4, key_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, count, length, size, generator=generator, dtype=dtype).requires_grad_()
        for count, size in ((heads, 8), (key_heads, 8), (key_heads, 6))
    ]


def exact(tensors, pattern, scale=None):
    """Attention of a layer that stays exact, as transformers calls it."""
    module = torch.nn.Module()
    module.favor, module.is_causal = None, pattern.is_causal
    module.num_key_value_groups = tensors[0].shape[1] // tensors[1].shape[1]
    out, _ = AttentionInterface()["favor"](module, *tensors, pattern, scaling=scale)
    return out.transpose(1, 2)


def dense(tensors, seen, scale=None):
    query, *rest = tensors
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in rest)
    blind = ~seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen | blind, scale=scale)
    return out.masked_fill(blind, 0.0)


def local(window, length, kind="sliding", mask=None):
    settings = {"sliding_window": window + (kind == "sliding")}
    return make(kind, mask=mask, length=length, settings=settings)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["sliding", "bidirectional sliding"])
@pytest.mark.parametrize("window", [1, 5, 48, 70])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_local_attention_is_that_of_a_dense_mask(length, window, kind, masked):
    given, mask = tensors(length), None
    # Shorter ones go to torch with a dense mask.
    if masked and length > 4 * (window + 1):
        mask = (torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.6).long()
        # A row whose beginning sees nothing: zeros.
        mask[1, : length // 2] = 0
    pattern = local(window, length, kind, mask)
    got, expected = exact(given, pattern), dense(given, described(pattern, length))
    torch.testing.assert_close(got, expected)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype)
    gradients = [torch.autograd.grad(x, given, weight) for x in (got, expected)]
    for gradient, want in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize(
    ("heads", "key_heads", "dtype", "tolerance"),
    [
        (1, 1, torch.float64, 1e-10),
        (4, 4, torch.float32, 1e-5),
        (6, 2, torch.float64, 1e-10),
        (6, 1, torch.bfloat16, 0.05),
    ],
)
def test_local_attention_of_grouped_heads_in_other_precisions(heads, key_heads, dtype, tolerance):
    given, pattern = tensors(100, heads, key_heads, dtype), local(9, 100)
    out = exact(given, pattern, scale=0.7)
    assert out.dtype == dtype
    expected = dense([x.double() for x in given], described(pattern, 100), scale=0.7)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_memory_of_local_attention_is_linear_in_the_length():
    """No tensor of the computation has as many elements as there are pairs."""
    length, window = 4096, 8
    given, pattern = [x.detach() for x in tensors(length, 1, 1)], local(window, length)
    with HeldBytes() as held:
        exact(given, pattern)
    assert 0 < max(held.largest.values()) <= length * 4 * (window + 64)
