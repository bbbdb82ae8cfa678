"""Converted models compiled and exported: the same outputs, for padding that was not exported."""

import io

import pytest
import torch

from performers import PerformerAttention, SoftmaxFeatures
from tests.convert.models import CLOSE, build, converted, inputs, output, padding_mask, token_ids


class Logits(torch.nn.Module):
    """Logits of a converted model, from token ids and a mask."""

    def __init__(self, name, **options):
        super().__init__()
        self.model = converted(build(name), num_features=16, **options)
        self.arguments = {"use_cache": False} if name == "llama" else {}

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, **self.arguments).logits


class Attended(torch.nn.Module):
    """Embedded token ids after ``PerformerAttention``, from the ids and a mask."""

    def __init__(self, window):
        super().__init__()
        self.embedding = torch.nn.Embedding(70, 16)
        features = SoftmaxFeatures(8, 16)
        self.attention = PerformerAttention(
            16, 2, feature_map=features, window=window, batch_first=True
        )

    def forward(self, ids, mask):
        x = self.embedding(ids)
        return self.attention(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, copying its trees
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention", {"window": 2}),
        ("bert", {}),
        ("bert", {"window": 2}),
        ("llama", {"window": 2, "sinks": 2}),
    ],
    ids=str,
)
@torch.no_grad()
def test_onnxruntime_agrees_with_torch(name, options):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Attended(**options) if name == "attention" else Logits(name, **options)
    model, ids = model.eval(), token_ids(2, 10)
    given = (ids, padding_mask(2, 10, "right", 3))
    program = torch.onnx.export(model, given, dynamo=True, verbose=False)
    file = io.BytesIO(program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for count in (0, 3, 7):
        mask = padding_mask(2, 10, "right", count) if count else torch.ones_like(ids)
        feed = {name: x.numpy() for name, x in zip(names, (ids, mask), strict=True)}
        got = torch.from_numpy(session.run(None, feed)[0])
        torch.testing.assert_close(got, model(ids, mask), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_an_exported_model_takes_other_padding():
    ids, mask = token_ids(2, 20), padding_mask(2, 20, "left")
    model = Logits("llama", window=3, sinks=2).eval()
    exported = torch.export.export(model, (ids, torch.ones_like(mask))).module()
    got, expected = (x(ids, mask)[1, 7:] for x in (exported, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "torch_encoder"])
def test_compiled_models_compute_the_same(name):
    model = converted(build(name), num_features=16, window=2)
    compiled = torch.compile(model, backend="eager")
    for side in ("none", "right"):
        mask = padding_mask(2, 20, side)
        told = {"attention_mask": mask} if name == "bert" else {"src_key_padding_mask": mask == 0}
        got = output(compiled, inputs(name), **told)
        torch.testing.assert_close(got, output(model, inputs(name), **told), **CLOSE)
    torch._dynamo.reset()
