"""Small models built on torch's attention, and what goes into them."""

import warnings

import torch
from torch import nn

from performers.convert.families.torch_modules import TorchModules
from performers.convert.options import Conversion
from performers.convert.to_performer import convert as convert_family
from tests.features.cases import generator

E, HEADS, L, N = 16, 4, 12, 3
PADDING = torch.arange(L).expand(N, -1) >= torch.tensor([[12], [9], [5]])
# Covers the sequence: exact attention, whatever the features.
EXACT = Conversion(num_features=8, window=L)
CLOSE = {"rtol": 0, "atol": 1e-5}


def convert(model, settings=EXACT, calibration=None, seed=0):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert_family(TorchModules(model, settings), calibration, generator(seed))


def inputs(*shape, seed=1):
    return torch.randn(*(shape or (N, L, E)), generator=generator(seed))


def encoder(layers=2, *, seed=0, **options):
    torch.manual_seed(seed)
    options = {"dropout": 0.0, "batch_first": True, **options}
    with warnings.catch_warnings():
        # Says for which options torch has no fused layers.
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 32, **options), layers)


class Wrapped(nn.Module):
    """A module of somebody's own around torch's attention."""

    def __init__(self, heads=HEADS, **options):
        super().__init__()
        torch.manual_seed(2)
        self.attention = nn.MultiheadAttention(E, heads, **options)

    def forward(self, query, key=None, value=None, **options):
        key = query if key is None else key
        return self.attention(query, key, key if value is None else value, **options)


class Skewed(nn.Module):
    """Attention whose queries and keys vary along few directions and are not centred."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(8)
        self.attention = nn.MultiheadAttention(E, 2, batch_first=True)
        with torch.no_grad():
            spectrum = 4.0 / torch.arange(1, E // 2 + 1)
            for part, sign in ((0, 1), (1, -1)):
                rows = slice(part * E, (part + 1) * E)
                self.attention.in_proj_weight[rows] *= spectrum.repeat(2)[:, None]
                self.attention.in_proj_bias[rows] = sign * 1.5

    def forward(self, x, mask=None, *, scale=1.0):
        return self.attention(scale * x, scale * x, scale * x, mask, need_weights=False)[0]
