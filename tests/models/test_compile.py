"""``torch.compile`` of whole models: no graph break, the values and gradients of eager."""

import pytest
import torch

from performers.models import PerformerForMaskedLM
from tests.models.cases import (
    MAIN,
    TOLERANCE,
    gradients,
    make_config,
    masked_model,
    right_padded,
    tokens,
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("attention", MAIN)
def test_compiled_without_graph_breaks(attention):
    """Values and gradients of a masked language model, in float32 as it is used."""
    torch.manual_seed(0)
    model = PerformerForMaskedLM(make_config(attention))
    ids = tokens(2, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = model(ids, labels=ids)
    eager.loss.backward()
    expected = gradients(model)
    output = compiled(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, eager.logits, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu", "exact"])
def test_compiled_with_a_mask(attention):
    model = masked_model(attention)
    ids, mask = right_padded([row[:n] for row, n in zip(tokens(2, 20), (20, 13), strict=True)])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(
        logits[real], model(ids, attention_mask=mask).logits[real], **TOLERANCE
    )
