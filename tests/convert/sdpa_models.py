"""Small models that call ``scaled_dot_product_attention`` as nanoGPT and timm do."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

WIDTH, HEADS, LENGTH = 32, 2, 24


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class CausalAttention(nn.Module):
    """As in nanoGPT: torch's function through ``F``."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (heads(y) for y in self.c_attn(x).split(WIDTH, dim=2))
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, None, rate, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class ImageAttention(nn.Module):
    """As in timm: the function by its name, normalised queries and keys."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x, attn_mask=None):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), attention
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x, *args, **kwargs):
        x = x + self.attention(self.norm(x), *args, **kwargs)
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.blocks = nn.ModuleList(Block(CausalAttention(**options)) for _ in range(2))

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(*(Block(ImageAttention()) for _ in range(2)))
        self.batch_norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)
        return self.head(self.batch_norm(self.blocks(x).mean(1)))


def build(kind, **options):
    torch.manual_seed(0)
    return kind(**options).eval()


def example(kind, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if kind is GPT:
        return torch.randint(50, (2, LENGTH), generator=generator)
    return torch.randn(2, 3, 16, 24, generator=generator)
