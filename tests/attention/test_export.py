"""The backend under export: ``native`` for ``torch.export``, ``torch`` for ONNX."""

import contextlib

import pytest
import torch

from performers import SoftmaxFeatures, backends, favor_attention, use_backend

pytestmark = pytest.mark.skipif("native" not in backends(), reason="needs the native library")
INPUT = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))


class Attention(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.features, self.backend = SoftmaxFeatures(4, 8), backend

    def forward(self, x):
        return favor_attention(x, x, x, self.features, backend=self.backend)


def exported(strict=False, backend=None):
    """Names of the operators of an exported call."""
    graph = torch.export.export(Attention(backend), (INPUT,), strict=strict).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def is_native(names):
    assert names
    return any(name.startswith("performers.") for name in names)


@pytest.mark.parametrize("strict", [False, True])
def test_only_onnx_goes_without_the_native_operators(monkeypatch, strict):
    assert is_native(exported(strict))
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        assert not is_native(exported(strict))
    assert is_native(exported(strict))


@pytest.mark.parametrize("by_context", [False, True])
def test_native_by_name_is_refused_for_onnx(monkeypatch, by_context):
    context = use_backend("native") if by_context else contextlib.nullcontext()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    message = "'torch' during an ONNX export, got 'native'"
    with context, pytest.raises(ValueError, match=message):
        exported(backend=None if by_context else "native")
