"""Models with the attentions to compare with: laws that all of them keep."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from performers.models import PerformerCache, PerformerConfig, PerformerForMaskedLM
from performers.models.attention import build_mechanism
from performers.models.context import AttentionContext
from performers.models.registry import ATTENTIONS
from studies.comparators import COMPARATORS
from studies.comparators.lsh import HashFeatures
from tests.models.cases import TOLERANCE, gradients, tokens
from tests.studies.comparators.oracle import CAUSAL, EVERY, make_config, make_model

KINDS = pytest.mark.parametrize(("attention", "is_causal"), EVERY)


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


@KINDS
@pytest.mark.parametrize("kind", ["plain", "masked and packed"])
def test_work_and_memory_grow_with_length_and_not_with_its_square(attention, is_causal, kind):
    """Forward and backward, with sizes as they are used."""
    window = {"window": 64}
    options = {"linformer": {"rank": 64}, "local": window, "longformer": window, "routing": window}
    # The stride of ``sparse`` is the root of the length that it is built for.
    rooted = attention == "sparse" and kind == "plain"
    sizes, flops = [], []
    for length in (1024, 2048):
        config = PerformerConfig(
            hidden_size=32,
            num_attention_heads=2,
            attention=attention,
            attention_options=options.get(attention, {}),
            max_position_embeddings=length if rooted else 2048,
            is_decoder=is_causal,
        )
        mechanism = build_mechanism(config)
        mask = ids = None
        if kind != "plain":
            mask = torch.ones(1, length, dtype=torch.bool)
            mask[:, -length // 16 :] = False
            # Linformer refuses packed rows.
            if attention != "linformer":
                ids = (torch.arange(length) // 256)[None]
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
    growth = 2**1.5 if rooted else 2
    assert sizes[1] < 2048**2
    # Strides are whole numbers.
    assert sizes[1] <= 1.03 * growth * sizes[0]
    assert 0.95 * growth * flops[0] < flops[1] < 1.05 * growth * flops[0]


@pytest.mark.parametrize("attention", CAUSAL)
def test_the_start_of_a_row_is_read_as_if_it_were_all(attention):
    """Nothing depends on how long the row is going to be, nor on later tokens."""
    model = make_model(attention, True)
    ids = tokens(2, 60)
    whole = model(ids).logits
    for length in (1, 7, 32, 59):
        torch.testing.assert_close(model(ids[:, :length]).logits, whole[:, :length], **TOLERANCE)


@KINDS
def test_gradients_of_reversible_blocks_are_those_of_autograd(attention, is_causal):
    model = make_model(
        attention, is_causal, reversible=True, num_hidden_layers=4, initializer_range=0.1
    )
    ids = tokens(2, 12)
    # Hidden states are asked for: activations are kept.
    model(ids, labels=ids, output_hidden_states=True).loss.backward()
    expected = gradients(model)
    model(ids, labels=ids).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("buckets", [8, 2**17])
def test_buckets_are_those_of_the_forward_pass(buckets, monkeypatch):
    """Rounding may put any token into another bucket; here it puts all of them there."""
    options = {"buckets": buckets, "chunk_size": 4}
    model = make_model("lsh", options=options, reversible=True, num_hidden_layers=4)
    if buckets > 2**15:
        # Two buckets, whose numbers are the same in 16 bits.
        once = HashFeatures.hash
        monkeypatch.setattr(HashFeatures, "hash", lambda self, x: once(self, x) // 2**16 * 2**16)
    ids = tokens(2, 40)
    model(ids, labels=ids, output_hidden_states=True).loss.backward()
    expected = gradients(model)
    loss = model(ids, labels=ids).loss
    whole = HashFeatures.hash
    monkeypatch.setattr(HashFeatures, "hash", lambda self, x: whole(self, x).roll(7, dims=-1))
    # Twice: what was kept is kept for as long as the graph.
    for again in (True, False):
        loss.backward(retain_graph=again)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize(("attention", "beams"), [*((x, 1) for x in CAUSAL), ("lsh", 3)])
def test_generation_reads_the_row_again(attention, beams):
    model = make_model(attention, True, tie_word_embeddings=False, seed=3)
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
    model = make_model("lsh", True, tie_word_embeddings=False, seed=3)
    ids = tokens(2, 9)
    expected = model.generate(ids, max_new_tokens=4, min_new_tokens=4)
    wish = GenerationConfig(max_new_tokens=4, min_new_tokens=4, use_cache=use_cache)
    assert torch.equal(model.generate(ids, generation_config=wish), expected)
    assert wish.use_cache is use_cache
    assert not said
    assert copy.deepcopy(model.generation_config).use_cache is True


def test_there_is_no_cache():
    model = make_model("lsh", True)
    ids = tokens(1, 5)
    assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match=r"'lsh' has no cache.*use_cache=True"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match=r"'lsh' has no cache.*past_key_values"):
        model(ids, past_key_values=PerformerCache("favor-softmax", 2))
    with pytest.raises(ValueError, match=r"'lsh' has no cache.*use_cache=True"):
        model.generate(ids, use_cache=True, max_new_tokens=2)


@KINDS
def test_autocast(attention, is_causal):
    model = make_model(attention, is_causal).float().train()
    ids = tokens(2, 40)
    full = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids, labels=ids)
    half.loss.backward()
    assert half.logits.dtype == torch.bfloat16
    assert abs(half.loss.item() - full.item()) < 0.2
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("attention", "other"), [("linformer", "exact"), ("routing", "lsh")])
def test_parameters_are_saved_and_drawn_where_a_file_lacks_them(attention, other, tmp_path):
    def parameters(model):
        found = [layer.attention.mechanism for layer in model.performer.layers]
        return [parameter for module in found for parameter in module.parameters()]

    def check(drawn):
        assert len({parameter.sum().item() for parameter in drawn}) == len(drawn)
        for parameter in drawn:
            if attention == "routing":
                torch.testing.assert_close(parameter.norm(dim=-1), torch.ones(2, 3))
            else:
                assert parameter.shape == (16, 400)
                assert abs(parameter.std().item() * 4 - 1) < 0.05

    torch.manual_seed(0)
    longest = {"max_position_embeddings": 400}
    options = {"rank": 16} if attention == "linformer" else {}
    model = PerformerForMaskedLM(make_config(attention, options, **longest))
    check(parameters(model))
    model.save_pretrained(tmp_path / "whole")
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path / "whole")
    for one, two in zip(parameters(loaded), parameters(model), strict=True):
        assert torch.equal(one, two)
    # Queries are keys in lsh as in routing.
    PerformerForMaskedLM(make_config(other, **longest)).save_pretrained(tmp_path / "other")
    check(parameters(PerformerForMaskedLM.from_pretrained(tmp_path / "other", config=model.config)))


def test_without_the_study_a_saved_model_is_refused_by_name(tmp_path, monkeypatch):
    make_model("lsh").float().save_pretrained(tmp_path)
    for name in COMPARATORS:
        monkeypatch.delitem(ATTENTIONS, name)
    with pytest.raises(ValueError, match=r"^attention must be one of") as error:
        PerformerForMaskedLM.from_pretrained(tmp_path)
    assert "('favor-softmax', " in str(error.value)
    assert "got 'lsh'; import the package that registers it" in str(error.value)
    assert "linformer" not in str(error.value)


@pytest.mark.parametrize(
    ("attention", "options", "words"),
    [
        ("linformer", {"rank": 0}, "rank must be at least 1"),
        ("lsh", {"buckets": 7}, "buckets must be even, or 1, got 7"),
        ("lsh", {"buckets": 0}, "buckets must be at least 1"),
        ("lsh", {"rounds": 0}, "rounds must be at least 1"),
        ("lsh", {"chunk_size": 0}, "chunk_size must be at least 1"),
        ("lsh", {"window": 4}, "are buckets, chunk_size, rounds, got window"),
        ("local", {"window": -1}, "window must be at least 0"),
        ("bigbird", {"block_size": 0}, "block_size must be at"),
        ("bigbird", {"random_blocks": -1}, "random_blocks must be at"),
        ("bigbird", {"global_blocks": -1}, "global_blocks must be at"),
        ("sparse", {"stride": 0}, "stride must be at least 1"),
        ("sparse", {"pattern": "random"}, "pattern must be one of"),
        ("sparse", {"pattern": "fixed", "stride": 1}, "summary must be at most the stride, 1"),
        ("longformer", {"dilation": 0}, "dilation must be at least 1"),
        ("longformer", {"window": -1}, "window must be at least 0"),
        ("routing", {"clusters": 0}, "clusters must be at least 1"),
        ("routing", {"window": 0}, "window must be at least 1"),
        ("routing", {"decay": 1.5}, "decay must be at least 0 and at most 1"),
    ],
)
def test_options_that_are_refused(attention, options, words):
    with pytest.raises(ValueError, match=f"attention_options of attention='{attention}'.*{words}"):
        make_config(attention, options)


@pytest.mark.parametrize(
    ("attention", "option", "sizes"),
    [
        ("linformer", "rank", [128, 256]),
        ("lsh", "buckets", [2, 16]),
        ("routing", "clusters", [12, 32]),
        ("sparse", "stride", [12, 32]),
    ],
)
def test_sizes_that_were_not_chosen_follow_from_the_longest_input(attention, option, sizes):
    found = []
    for length in (128, 1024):
        config = PerformerConfig(attention="exact", max_position_embeddings=length)
        # Also for an attention that is set later.
        config.attention = attention
        mechanism = build_mechanism(config)
        found.append(getattr(mechanism.options, option))
        assert f"{option}={found[-1]}" in repr(mechanism)
        assert config.attention_options[option] is None
    assert found == sizes


@pytest.mark.parametrize("packed", [False, True])
@KINDS
def test_empty_inputs_have_empty_outputs(attention, is_causal, packed):
    model = make_model(attention, is_causal)
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        ids = torch.zeros(batch, length, dtype=torch.long)
        options = {"sequence_ids": ids} if packed and attention != "linformer" else {}
        for wanted in (False, True):
            out = model(ids, output_attentions=wanted, use_cache=False, **options)
            assert out.logits.shape == (batch, length, 31)
            out.logits.sum().backward()
            shapes = [x.shape for x in out.attentions or ()]
            assert shapes == [(batch, 2, length, length)] * (2 * wanted)
