"""GPSConv with our attention inside."""

import copy

import pytest
import torch

pytest.importorskip("torch_geometric")

from torch_geometric.nn import GINConv, GPSConv, SAGEConv
from torch_geometric.nn.attention import PerformerAttention

import performers
from performers.convert import to_performer
from performers.graphs import GraphAttention, replace_

TYPES = ("performer", "multihead")


def gps(attn_type, channels=32, **options):
    torch.manual_seed(0)
    conv = GINConv(torch.nn.Linear(channels, channels))
    return GPSConv(channels, conv, heads=4, attn_type=attn_type, **options).eval()


def two_graphs():
    torch.manual_seed(3)
    x = torch.randn(310, 32)
    small, big = torch.randint(0, 10, (2, 20)), torch.randint(10, 310, (2, 900))
    return x, torch.cat((small, big), dim=1), torch.tensor([0] * 10 + [1] * 300), small


@pytest.mark.parametrize("attn_type", TYPES)
def test_a_graph_does_not_depend_on_its_batch(attn_type):
    x, edges, batch, small = two_graphs()
    model = replace_(gps(attn_type))
    alone = model(x[:10], small, batch=batch[:10])
    torch.testing.assert_close(model(x, edges, batch=batch)[:10], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x[:10], small), alone, rtol=1e-6, atol=1e-6)


def test_multihead_attention_is_approached_as_features_grow():
    x, edges, batch, _ = two_graphs()
    exact = gps("multihead")
    expected = exact(x, edges, batch=batch)
    errors = []
    for count in (16, 4096):
        model = replace_(
            copy.deepcopy(exact), num_features=count, generator=torch.Generator().manual_seed(1)
        )
        assert model.attn.in_proj_weight is not exact.attn.in_proj_weight
        errors.append((model(x, edges, batch=batch) - expected).norm() / expected.norm())
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.01


def test_to_performer_calls_the_attention_of_gps_conv():
    """With a window over the whole graph, the output is the original's."""
    x, edges, batch, _ = two_graphs()
    model = gps("multihead")
    expected = model(x, edges, batch=batch)
    before = model.attn
    to_performer(model, window=300)
    assert model.attn is not before
    calls = []
    model.attn.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(model(x, edges, batch=batch), expected, rtol=1e-4, atol=1e-5)
    assert calls == [1]


@pytest.mark.parametrize("attn_type", TYPES)
def test_weights_and_modes_stay(attn_type):
    model = torch.nn.ModuleList([gps(attn_type, attn_kwargs={"dropout": 0.0}) for _ in range(2)])
    parameters = dict(model.named_parameters())
    model[1].train()
    replace_(model, num_features=48)
    assert dict(model.named_parameters()).items() == parameters.items()
    assert [layer.attn.feature_map.num_features for layer in model] == [48, 48]
    assert [layer.attn.training for layer in model] == [False, True]


def test_the_kernel_of_a_layer_stays():
    model = replace_(gps("performer", attn_kwargs={"kernel": torch.nn.Sigmoid(), "dropout": 0.3}))
    assert isinstance(model.attn, GraphAttention)
    assert isinstance(model.attn.feature_map.fn, torch.nn.Sigmoid)
    assert model.attn.dropout.p == 0.3
    assert replace_(gps("performer")).attn.feature_map.fn == "relu"


def test_attention_that_layers_share_stays_shared():
    model = torch.nn.ModuleList([gps("performer"), gps("performer")])
    model[1].attn = model[0].attn
    replace_(model)
    assert model[0].attn is model[1].attn
    assert isinstance(model[0].attn, GraphAttention)


def test_attention_elsewhere_stays():
    model = torch.nn.ModuleDict(
        {"gps": gps("multihead"), "other": torch.nn.MultiheadAttention(32, 4)}
    )
    replace_(model)
    assert isinstance(model["gps"].attn, performers.PerformerAttention)
    assert type(model["other"]) is torch.nn.MultiheadAttention


def test_calibration():
    x, edges, batch, _ = two_graphs()
    inputs = {"x": x, "edge_index": edges, "batch": batch}
    exact = gps("multihead")
    with torch.no_grad():
        exact.attn.in_proj_weight.mul_(3)
    expected = exact(**inputs)
    errors = []
    for options in ({}, {"estimator": "data_aware", "calibration": [inputs]}):
        generator = torch.Generator().manual_seed(0)
        model = replace_(copy.deepcopy(exact), num_features=64, generator=generator, **options)
        errors.append((model(**inputs) - expected).norm())
    assert errors[1] < errors[0]


@pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR", "ignore:Sparse CSR tensor")
@pytest.mark.parametrize("norm", [None, "batch_norm", "layer_norm"])
@pytest.mark.parametrize("attn_type", TYPES)
def test_what_pytorch_geometric_asks_of_gps_conv(attn_type, norm):
    x, edges = torch.randn(4, 16), torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1]])
    conv = GPSConv(16, conv=SAGEConv(16, 16), heads=4, norm=norm, attn_type=attn_type)
    replace_(conv)
    conv.reset_parameters()
    assert str(conv) == (
        f"GPSConv(16, conv=SAGEConv(16, 16, aggr=mean), heads=4, attn_type={attn_type})"
    )
    out = conv(x, edges)
    assert out.shape == (4, 16)
    sparse = torch.sparse_coo_tensor(edges.flip(0), torch.ones(4), (4, 4), check_invariants=True)
    sparse = sparse.coalesce()
    torch.testing.assert_close(conv(x, sparse), out, rtol=1e-5, atol=1e-5)
    out = conv(x, edges, torch.tensor([0, 0, 1, 1]))
    assert out.shape == (4, 16)
    torch.testing.assert_close(
        conv(x, sparse, torch.tensor([0, 0, 1, 1])), out, rtol=1e-5, atol=1e-5
    )
    out.sum().backward()
    assert all(p.grad is not None for p in conv.attn.parameters())


class Subclass(PerformerAttention):
    def forward(self, x, mask=None):
        return x


def with_subclass():
    model = gps("performer")
    model.attn = Subclass(32, 4)
    return model


def with_hook():
    model = gps("multihead")
    model.attn.register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, "has no torch_geometric.nn.GPSConv"),
        (lambda: replace_(gps("performer")), {}, "is replaced already"),
        (lambda: replace_(gps("multihead")), {}, "is replaced already"),
        (with_subclass, {}, "attn .Subclass. has a forward of its own"),
        (with_hook, {}, "attn .MultiheadAttention. has hooks"),
        (lambda: gps("performer"), {"estimator": "optimal"}, "estimator is for layers"),
        (lambda: gps("performer"), {"calibration": []}, "calibration is for layers"),
        (lambda: gps("multihead"), {"estimator": "none"}, "estimator must be"),
        (lambda: gps("multihead"), {"num_features": -1}, "num_features must be"),
        (lambda: gps("performer"), {"num_features": 0}, "num_features must be"),
    ],
)
def test_what_cannot_be_replaced_is_refused(make, options, message):
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        replace_(model, **options)
    assert dict(model.named_modules()) == before
    with pytest.raises(TypeError, match="model must be a torch module"):
        replace_("gps")
