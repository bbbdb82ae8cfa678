"""Converted models compiled and exported: the same outputs, for padding that was not exported."""

import io

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from performers.convert import to_performer
from performers.nn import PerformerAttention
from tests.convert.models import CLOSE, build, converted, output, padding_mask, token_ids
from tests.convert.models import inputs as inputs_of

LENGTH = 10
SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


class Attention(torch.nn.Module):
    """Self-attention with a mask of the keys that take part."""

    def __init__(self, **options):
        super().__init__()
        self.attention = PerformerAttention(16, 2, num_features=16, batch_first=True, **options)
        self.embedding = torch.nn.Embedding(30, 16)

    def forward(self, ids, mask):
        x = self.embedding(ids)
        return self.attention(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0]


class Hidden(torch.nn.Module):
    """Hidden states of a converted model."""

    def __init__(self, model, options, **arguments):
        super().__init__()
        self.model, self.arguments = to_performer(model, num_features=16, **options), arguments

    def forward(self, ids, mask):
        return self.model(ids, attention_mask=mask, **self.arguments).last_hidden_state


def bert(**options):
    config = BertConfig(**SMALL, attention_probs_dropout_prob=0.0)
    return Hidden(BertModel(config, add_pooling_layer=False), options)


def llama(**options):
    return Hidden(LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=1)), options, use_cache=False)


MODELS = {
    "attention": lambda: Attention(window=2),
    "BERT": bert,
    "BERT with a window": lambda: bert(window=2),
    "Llama with a window and sinks": lambda: llama(window=2, sinks=2),
}


def inputs(*lengths):
    ids = torch.randint(1, 30, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)).long()


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, copying its trees
@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_agrees_with_torch(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        program = torch.onnx.export(model, inputs(LENGTH, 7), dynamo=True, verbose=False)
        file = io.BytesIO(program.model_proto.SerializeToString())
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        for lengths in ((LENGTH, LENGTH), (LENGTH, 7), (3, 9)):
            given = inputs(*lengths)
            feed = {name: x.numpy() for name, x in zip(names, given, strict=True)}
            got = torch.from_numpy(session.run(None, feed)[0])
            torch.testing.assert_close(got, model(*given), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "torch_encoder"])
def test_compiled_models_compute_the_same(name):
    model = converted(build(name), num_features=16, window=2)
    compiled = torch.compile(model, backend="eager")
    for side in ("none", "right"):
        mask = padding_mask(2, 20, side)
        told = {"attention_mask": mask} if name == "bert" else {"src_key_padding_mask": mask == 0}
        got = output(compiled, inputs_of(name), **told)
        torch.testing.assert_close(got, output(model, inputs_of(name), **told), **CLOSE)
    torch._dynamo.reset()


def test_an_exported_model_takes_other_padding():
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = converted(build("llama"), num_features=16, window=3, sinks=2)

        def forward(self, ids, mask):
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    ids, mask, model = token_ids(2, 20), padding_mask(2, 20, "left"), Logits()
    with torch.no_grad():
        exported = torch.export.export(model, (ids, torch.ones_like(mask))).module()
        torch.testing.assert_close(
            exported(ids, mask)[1, 7:], model(ids, mask)[1, 7:], atol=1e-4, rtol=1e-4
        )
