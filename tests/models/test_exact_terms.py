"""Models whose attention is exact within a window and to the first tokens."""

import pytest
import torch
from torch.nn import functional as F

from performers import PerformerAttention
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM


def config(**options):
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_features": 32,
        "hidden_dropout_prob": 0.0,
    }
    return PerformerConfig(**{**sizes, "window": 8, "sinks": 2, **options})


def tokens(length=40, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, 30, (2, length), generator=random)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_window_over_everything_is_exact_attention(is_decoder):
    torch.manual_seed(0)
    kind = PerformerForCausalLM if is_decoder else PerformerForMaskedLM
    windowed = kind(config(window=64, sinks=0, is_decoder=is_decoder)).eval()
    exact = kind(config(window=None, sinks=0, attention="exact", is_decoder=is_decoder)).eval()
    exact.load_state_dict(windowed.state_dict(), strict=False)
    x = tokens()
    torch.testing.assert_close(windowed(x).logits, exact(x).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_token_at_a_time_equals_the_whole_row():
    torch.manual_seed(1)
    model = PerformerForCausalLM(config(is_decoder=True)).eval()
    x = tokens()
    whole = model(x).logits
    out = model(x[:, :17], use_cache=True)
    parts, size = [out.logits], out.past_key_values.nbytes
    for i in range(17, x.shape[1]):
        out = model(x[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
    assert out.past_key_values.nbytes == size


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache_agree(beams):
    torch.manual_seed(2)
    model = PerformerForCausalLM(config(is_decoder=True)).eval()
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": beams}
    cached = model.generate(tokens(10), **options)
    assert torch.equal(cached, model.generate(tokens(10), use_cache=False, **options))


@torch.no_grad()
def test_left_padding_changes_nothing():
    torch.manual_seed(3)
    model = PerformerForCausalLM(config(is_decoder=True)).eval()
    x = tokens()
    padded = F.pad(x, (5, 0), value=0)
    out = model(padded, attention_mask=(padded != 0).long()).logits[:, 5:]
    torch.testing.assert_close(out, model(x).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_packed_rows_equal_single_ones_and_refuse_the_matrix():
    torch.manual_seed(4)
    model = PerformerForMaskedLM(config()).eval()
    x = tokens(30)
    row = torch.cat((x[0], x[1]))[None]
    ids = torch.arange(2).repeat_interleave(30)[None]
    out = model(row, sequence_ids=ids).logits[0]
    torch.testing.assert_close(out, model(x).logits.flatten(0, 1), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="sinks"):
        model(row, sequence_ids=ids, output_attentions=True)
    matrix = model(x, output_attentions=True).attentions[0]
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 4, 30), rtol=0, atol=1e-5)


def test_configurations_round_trip_and_refuse_other_kernels(tmp_path):
    config().save_pretrained(tmp_path)
    loaded = PerformerConfig.from_pretrained(tmp_path)
    assert (loaded.window, loaded.sinks) == (8, 2)
    for attention in ("favor-relu", "exact", "identity"):
        with pytest.raises(ValueError, match="window and sinks"):
            config(attention=attention)
    for name in ("window", "sinks"):
        with pytest.raises(ValueError, match=name):
            config(**{name: -1})


def test_the_module_takes_a_window():
    torch.manual_seed(5)
    x = torch.randn(2, 50, 32)
    module = PerformerAttention(32, 4, batch_first=True, window=50)
    exact = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    exact.load_state_dict(module.state_dict(), strict=False)
    out, weights = module(x, x, x, need_weights=True)
    expected, expected_weights = exact(x, x, x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-5)
    near = PerformerAttention(32, 4, batch_first=True, window=5, sinks=1)
    assert (near(x, x, x)[0] - PerformerAttention(32, 4, batch_first=True)(x, x, x)[0]).any()
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(ValueError, match=option):
            PerformerAttention(32, 4, window=5, **{option: True})
