"""A generated token costs the same however long the context."""

import statistics
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from performers.models import PerformerConfig, PerformerForCausalLM
from tests.models.cases import FAVOR, MAIN, make_config, tokens


def model_and_cache(config, length):
    torch.manual_seed(0)
    model = PerformerForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(tokens(1, length), use_cache=True, logits_to_keep=1).past_key_values
    return model, cache


def step_flops(config, length, **options):
    model, cache = model_and_cache(config, length)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens(1, 1), past_key_values=cache, **options)
    return counter.get_total_flops(), cache.nbytes


@pytest.mark.parametrize("attention", [*FAVOR, "identity"])
def test_work_and_memory_of_a_step_do_not_grow(attention):
    config = make_config(attention, max_position_embeddings=4096)
    short, long = (step_flops(config, length) for length in (256, 2048))
    assert short == long
    assert short[0] > 0


def test_those_of_exact_attention_do():
    """Which shows that the measure sees growth (of matrix products, not of fused attention)."""
    config = make_config("exact")
    (short, short_bytes), (long, long_bytes) = (
        step_flops(config, length, output_attentions=True) for length in (256, 2048)
    )
    assert long > 2 * short
    assert long_bytes > 7 * short_bytes


@pytest.mark.parametrize("attention", MAIN)
def test_each_generated_token_is_one_row_of_work(attention):
    """``generate`` feeds the model the new token only, not the whole row again."""
    torch.manual_seed(0)
    model = PerformerForCausalLM(make_config(attention)).eval()
    lengths = []
    model.performer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(tokens(1, 40), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert lengths == [40, 1, 1, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu"])
def test_time_of_a_token_at_8192_tokens_is_that_at_256(attention):
    """Within 1.2 times; medians of interleaved steps, the best of three attempts."""
    config = PerformerConfig(attention=attention, hidden_size=256, num_attention_heads=4)
    pairs = [model_and_cache(config, length) for length in (256, 8192)]
    ratios = []
    for _ in range(3):
        times: list[list[float]] = [[], []]
        for _ in range(150):
            for index, (model, cache) in enumerate(pairs):
                start = time.perf_counter()
                with torch.no_grad():
                    model(tokens(1, 1), past_key_values=cache)
                times[index].append(time.perf_counter() - start)
        short, long = (statistics.median(values[20:]) for values in times)
        ratios.append(long / short)
    assert min(ratios) < 1.2, ratios
    assert min(ratios) > 0.5, ratios
