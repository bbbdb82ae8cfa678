"""``torch.compile`` of whole models: no graph break, the values and gradients of eager."""

import pytest
import torch

from performers.models import PerformerForMaskedLM
from tests.models.cases import (
    MAIN,
    TOLERANCE,
    assert_same,
    build,
    gradients,
    masked_model,
    right_padded,
    rows_of,
    tokens,
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "chunk", [0, pytest.param(6, marks=pytest.mark.exhaustive)], ids=["whole", "chunks"]
)
@pytest.mark.parametrize("name", MAIN)
def test_compiled_without_graph_breaks(name, chunk):
    """Values and gradients of a masked language model, in float32 as it is used."""
    model = build(PerformerForMaskedLM, name, chunk_size_feed_forward=chunk).train()
    ids = tokens(2, 20)
    eager = model(ids, labels=ids)
    eager.loss.backward()
    expected = gradients(model)
    output = compiled(model)(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, eager.logits, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["favor-softmax", "favor-relu", "exact"])
def test_compiled_with_a_mask(name):
    model = masked_model(name)
    ids, mask = right_padded(rows_of(20, 13))
    logits = compiled(model)(ids, attention_mask=mask).logits
    expected, real = model(ids, attention_mask=mask).logits, mask.bool()
    torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)
