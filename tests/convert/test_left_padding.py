"""Rotary decoders padded on the left, without position_ids: each row as if it were alone."""

import pytest
import torch

from tests.convert.architectures import build, converted, token_ids

ROTARY = ("llama", "qwen2", "gpt_neox", "gemma", "phi3")
LONG, SHORT = 20, 13
OPTIONS = {"num_features": 16, "window": 3, "sinks": 2}


def rows():
    """A batch of two rows, the second with padding on its left, and its mask."""
    ids = token_ids(2, LONG)
    mask = torch.ones_like(ids)
    mask[1, : LONG - SHORT] = 0
    return ids.masked_fill(mask == 0, 0), mask


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROTARY)
def test_a_padded_row_equals_the_row_alone(name):
    model = converted(build(name), **OPTIONS)
    ids, mask = rows()
    got = model(ids, attention_mask=mask, use_cache=False).logits
    close(got[0], model(ids[:1], use_cache=False).logits[0])
    close(got[1, -SHORT:], model(ids[1:, -SHORT:], use_cache=False).logits[0])


@pytest.mark.parametrize("name", ROTARY[:2])
@pytest.mark.parametrize("whole", [True, False])
def test_chunks_of_a_padded_row_go_on_at_its_positions(name, whole):
    """Whether later masks cover all tokens so far or those of their call."""
    model = converted(build(name), **OPTIONS)
    ids, mask = rows()
    cache, parts = None, []
    for start, stop in ((0, 9), (9, 14), (14, 15), (15, LONG)):
        options = {"attention_mask": mask[:, (0 if whole else start) : stop]}
        if cache is not None:
            options["past_key_values"] = cache
        out = model(ids[:, start:stop], use_cache=True, **options)
        cache = out.past_key_values
        parts.append(out.logits)
    got = torch.cat(parts, 1)
    close(got[1, -SHORT:], model(ids[1:, -SHORT:], use_cache=False).logits[0])


def test_reordered_rows_keep_their_padding():
    model = converted(build("llama"), **OPTIONS)
    ids, mask = rows()
    cache = model(ids[:, :15], attention_mask=mask[:, :15], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    got = model(ids[:, 15:].flip(0), past_key_values=cache, use_cache=True).logits
    close(got[0], model(ids[1:, -SHORT:], use_cache=False).logits[0, -5:])
    close(got[1], model(ids[:1], use_cache=False).logits[0, -5:])


def test_positions_of_the_caller_stay():
    model = converted(build("llama"), **OPTIONS)
    ids, mask = rows()
    positions = torch.arange(5, 5 + LONG).expand(2, -1)
    got = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    other = model(ids, attention_mask=mask, use_cache=False).logits
    assert (got - other).abs().max() > 1e-2


def test_a_traced_model_takes_other_padding():
    model = converted(build("llama", use_cache=False), **OPTIONS)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    ids, mask = rows()
    with torch.no_grad():
        exported = torch.export.export(Logits(), (ids, torch.ones_like(mask))).module()
        close(exported(ids, mask)[1, -SHORT:], Logits()(ids, mask)[1, -SHORT:])
