"""What all attentions to compare with have in common."""

import copy
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from performers.models import PerformerCache, PerformerConfig, PerformerForCausalLM
from performers.models.attention import build_mechanism
from performers.models.context import AttentionContext
from tests.models.cases import (
    COMPARATORS,
    EVERY,
    TOLERANCE,
    causal_model,
    gradients,
    make_config,
    make_model,
    masked_model,
    right_padded,
    tokens,
)

HERE = pytest.mark.parametrize(
    ("attention", "is_causal"), [kind for kind in EVERY if kind[0] in COMPARATORS]
)
CAUSAL = [name for name in COMPARATORS if name != "linformer"]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                # Broadcast views hold no more than they show.
                held = x.untyped_storage().nbytes() // max(1, x.itemsize)
                self.size = max(self.size, min(x.numel(), held))
        return out


@HERE
@pytest.mark.parametrize("kind", ["plain", "masked", "packed"])
def test_work_and_memory_grow_with_length_and_not_with_its_square(attention, is_causal, kind):
    """Forward and backward, with sizes as they are used."""
    if attention == "linformer" and kind == "packed":
        # Which it refuses.
        kind = "masked"
    config = PerformerConfig(
        hidden_size=32,
        num_attention_heads=2,
        attention=attention,
        window=64 if attention == "local" else None,
        linformer_rank=64,
        max_position_embeddings=4096,
        is_decoder=is_causal,
    )
    mechanism = build_mechanism(config)
    sizes, flops = [], []
    for length in (2048, 4096):
        mask = ids = None
        if kind == "masked":
            mask = torch.ones(1, length, dtype=torch.bool)
            mask[:, -100:] = False
        if kind == "packed":
            ids = (torch.arange(length) // 300)[None]
        context = AttentionContext(is_causal, key_mask=mask, sequence_ids=ids)
        tensors = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
        # The fused kernels for the processor are not counted.
        with (
            sdpa_kernel(SDPBackend.MATH),
            Largest() as largest,
            FlopCounterMode(display=False) as counter,
        ):
            mechanism(*tensors, context, 0)[0].sum().backward()
        sizes.append(largest.size)
        flops.append(counter.get_total_flops())
    assert sizes[0] < 2048**2
    assert sizes[1] <= 2.05 * sizes[0]
    assert 1.9 * flops[0] < flops[1] < 2.1 * flops[0]


def test_full_attention_would_be_seen():
    mechanism = build_mechanism(make_config("exact"))
    context = AttentionContext(is_causal=False, need_weights=True)
    with Largest() as largest:
        mechanism(*(torch.randn(1, 2, 512, 16) for _ in range(3)), context, 0)
    assert largest.size == 2 * 512**2


@HERE
def test_gradients_of_padded_rows(attention, is_causal):
    model = make_model(attention, is_causal)
    rows = [tokens(1, length, seed=length)[0] for length in (30, 17)]
    ids, mask = right_padded(rows)
    model(ids, attention_mask=mask).logits[mask.bool()].square().sum().backward()
    together = gradients(model)
    for row in rows:
        model(row[None]).logits.square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("attention", COMPARATORS)
def test_holes_inside_a_row_are_masked(attention):
    model = masked_model(attention)
    ids = tokens(1, 20)
    mask = torch.ones_like(ids)
    mask[0, [3, 11]] = 0
    other = ids.clone()
    other[0, [3, 11]] = 7
    real = mask.bool()
    before, after = (model(x, attention_mask=mask).logits[real] for x in (ids, other))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("attention", CAUSAL)
def test_the_start_of_a_row_is_read_as_if_it_were_all(attention):
    """Nothing depends on how long the row is going to be."""
    model = causal_model(attention)
    ids = tokens(2, 60)
    whole = model(ids).logits
    for length in (1, 7, 32, 59):
        torch.testing.assert_close(model(ids[:, :length]).logits, whole[:, :length], **TOLERANCE)


@pytest.mark.parametrize("attention", CAUSAL)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_reads_the_row_again(attention, beams):
    model = causal_model(attention, tie_word_embeddings=False, seed=3)
    ids = tokens(2, 9)
    lengths = []
    model.performer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = model.generate(ids, max_new_tokens=4, min_new_tokens=4, num_beams=beams)
    assert lengths == [9, 10, 11, 12]
    if beams == 1:
        for _ in range(4):
            logits = model(ids).logits[:, -1]
            logits[:, model.config.eos_token_id] = -torch.inf
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(found, ids)


@pytest.mark.parametrize("use_cache", [None, True])
def test_generation_with_a_configuration_is_silent_and_leaves_it_alone(use_cache, monkeypatch):
    """A copy of a model's own configuration has ``use_cache=True``, which is not a wish."""
    said = []
    monkeypatch.setattr(
        "transformers.generation.utils.logger.warning_once", lambda text, *_: said.append(text)
    )
    model = causal_model("lsh", tie_word_embeddings=False, seed=3)
    ids = tokens(2, 9)
    expected = model.generate(ids, max_new_tokens=4, min_new_tokens=4)
    wish = GenerationConfig(max_new_tokens=4, min_new_tokens=4, use_cache=use_cache)
    assert torch.equal(model.generate(ids, generation_config=wish), expected)
    assert torch.equal(model.generate(ids, wish), expected)
    assert wish.use_cache is use_cache
    assert not said
    assert copy.deepcopy(model.generation_config).use_cache is True


@pytest.mark.parametrize("attention", CAUSAL)
def test_there_is_no_cache(attention):
    model = causal_model(attention)
    ids = tokens(1, 5)
    assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match=rf"'{attention}' has no cache.*use_cache=True"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match=f"'{attention}' has no cache.*past_key_values"):
        model(ids, past_key_values=PerformerCache("favor-softmax", 2))
    with pytest.raises(ValueError, match=f"'{attention}' has no cache.*use_cache=True"):
        model.generate(ids, use_cache=True, max_new_tokens=2)
    assert masked_model(attention).performer(ids, use_cache=True).past_key_values is None


@HERE
def test_autocast(attention, is_causal):
    model = make_model(attention, is_causal).float().train()
    ids = tokens(2, 40)
    full = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids, labels=ids)
    half.loss.backward()
    assert half.logits.dtype == torch.bfloat16
    assert abs(half.loss.item() - full.item()) < 0.2
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("attention", CAUSAL)
def test_models_learn_to_copy(attention):
    """Eight letters again in order, which takes attention to tokens eight away."""
    torch.manual_seed(0)
    config = make_config(
        attention,
        hidden_size=64,
        intermediate_size=128,
        initializer_range=0.02,
        vocab_size=12,
        position_embedding="learned",
        **{"local": {"window": 12}, "bigbird": {"bigbird_block_size": 4}}.get(attention, {}),
    )
    model = PerformerForCausalLM(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(60):
        half = torch.randint(4, 12, (32, 8), generator=generator)
        ids = torch.cat((half, half), dim=1)
        labels = ids.clone()
        labels[:, :8] = -100
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.6 * sum(losses[:3]) / 3


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("linformer", {"linformer_rank": 12}),
        ("lsh", {"lsh_buckets": 6, "lsh_chunk_size": 5, "lsh_rounds": 2}),
        ("local", {"window": 9}),
        (
            "bigbird",
            {"bigbird_block_size": 3, "bigbird_global_blocks": 0, "bigbird_random_blocks": 4},
        ),
    ],
)
def test_options_survive_saving(tmp_path, attention, options):
    model = masked_model(attention, **options).float()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in options} == options
    torch.manual_seed(9)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert {name: getattr(loaded.config, name) for name in options} == options
    assert loaded.state_dict().keys() == model.state_dict().keys()
    ids = tokens(2, 50)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "linformer", "is_decoder": True}, "linformer.*no causal form"),
        ({"attention": "linformer", "linformer_rank": 0}, "linformer_rank must be at least 1"),
        ({"attention": "lsh", "lsh_buckets": 7}, "lsh_buckets must be even, or 1, got 7"),
        ({"attention": "lsh", "lsh_buckets": 0}, "lsh_buckets must be at least 1"),
        ({"attention": "lsh", "lsh_rounds": 0}, "lsh_rounds must be at least 1"),
        ({"attention": "lsh", "lsh_chunk_size": 0}, "lsh_chunk_size must be at least 1"),
        ({"attention": "lsh", "window": 4}, "window and sinks need .*'lsh'"),
        ({"attention": "local", "window": -1}, "window must be at least 0"),
        ({"attention": "local", "sinks": 2}, "window and sinks need .*'local'.*sinks=2"),
        ({"attention": "bigbird", "bigbird_block_size": 0}, "bigbird_block_size must be at"),
        ({"attention": "bigbird", "bigbird_random_blocks": -1}, "bigbird_random_blocks must be at"),
        ({"attention": "bigbird", "bigbird_global_blocks": -1}, "bigbird_global_blocks must be at"),
        ({"attention": "bigbird", "exact_layers": [0]}, "exact_layers needs a favor attention"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_config(**options)


def test_a_causal_linformer_is_refused_wherever_it_is_made():
    with pytest.raises(ValueError, match="no causal form"):
        PerformerForCausalLM(make_config("linformer"))


RESOLVED = {
    "window": ("local", lambda mechanism: mechanism.window, 128),
    "linformer_rank": ("linformer", lambda mechanism: len(mechanism.key_projection), 256),
    "lsh_buckets": ("lsh", lambda mechanism: mechanism.feature_map.buckets, 16),
}


@pytest.mark.parametrize("name", RESOLVED)
def test_sizes_that_were_not_chosen_follow_the_attention(name, tmp_path):
    """Also one that is set later, and without a trace in other models."""
    attention, size, expected = RESOLVED[name]
    options = {"max_position_embeddings": 1024, "lsh_chunk_size": 64, name: None}
    config = make_config(attention, **options)
    assert size(build_mechanism(config)) == expected
    assert getattr(config, name) is None
    later = make_config("exact", **options)
    later.attention = attention
    assert size(build_mechanism(later)) == expected
    config.save_pretrained(tmp_path)
    for other in ("favor-softmax", "exact"):
        loaded = PerformerConfig.from_pretrained(tmp_path, attention=other)
        assert getattr(build_mechanism(loaded), name, None) is None
        assert getattr(loaded, name) is None
    longer = PerformerConfig.from_pretrained(tmp_path, max_position_embeddings=2048)
    assert size(build_mechanism(longer)) == (32 if attention == "lsh" else expected)
    chosen = make_config(attention, **{**options, name: 6})
    assert size(build_mechanism(chosen)) == 6


def test_features_without_a_projection_are_refused_when_the_attention_is_set_later():
    config = make_config("favor-relu", projection=None)
    config.attention = "favor-softmax"
    with pytest.raises(ValueError, match="projection must not be None for favor-softmax"):
        build_mechanism(config)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_empty_inputs_have_empty_outputs(attention, is_causal, masked, packed):
    """Of all attentions, those of this library included."""
    model = make_model(attention, is_causal)
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        ids, options = torch.zeros(batch, length, dtype=torch.long), {}
        if masked:
            options["attention_mask"] = torch.zeros_like(ids)
        if packed and attention != "linformer":
            options["sequence_ids"] = torch.zeros_like(ids)
        for wanted in (False, True):
            out = model(ids, output_attentions=wanted, use_cache=False, **options)
            assert out.logits.shape == (batch, length, 31)
            out.logits.sum().backward()
            shapes = [x.shape for x in out.attentions or ()]
            assert shapes == [(batch, 2, length, length)] * (2 * wanted)
