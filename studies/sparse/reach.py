"""Layers until every token can reach every other one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from performers.models.context import AttentionContext
from studies.parts import Part
from studies.sparse.attentions import BY_CONTENT, PERFORMERS, mechanism, settings

_HEADS, _HEAD_DIM = 2, 16
_MOST_LAYERS = 512
_SHARE = 0.99


@dataclass(frozen=True)
class ReachSize:
    """Sizes of the search."""

    length: int = 8192
    keys: int = 128
    # Tokens whose way to all later ones is followed, and draws of queries that choose keys.
    sources: int = 32
    draws: int = 2


@torch.no_grad()
def measure_reach(name: str, size: ReachSize) -> Part:
    """Layers after which every later token has something of each source, for each draw.

    The attention itself is run on values that are 1 at tokens which a source has reached and 0
    elsewhere; weights are positive, so that an output is not 0 where a query sees such a token.
    Queries and keys are drawn anew for every layer, from N(0, 1).

    Returns:
        ``layers``, a list of a number a draw, and ``most``: layers for 99% of the pairs.
    """
    draws = size.draws if name in BY_CONTENT else 1
    layers, most = zip(*(_layers(name, size, seed) for seed in range(draws)), strict=True)
    return {"layers": list(layers), "most": list(most)}


def _layers(name: str, size: ReachSize, seed: int) -> tuple[int, int]:
    torch.manual_seed(seed)
    setting = settings(size.length, size.keys, is_causal=True)[name]
    sources = torch.randperm(size.length)[: size.sources]
    # The way of the first token to the last is the longest.
    sources[0] = 0
    place = torch.arange(size.length)[:, None]
    reached = place == sources
    context = AttentionContext(is_causal=True)
    later = place >= sources
    most: int | None = None
    for layer in range(_MOST_LAYERS):
        share = float((reached & later).sum() / later.sum())
        if most is None and share >= _SHARE:
            most = layer
        if share == 1:
            assert most is not None
            return layer, most
        attend = mechanism(setting, _HEADS, _HEAD_DIM, size.length, is_causal=True, layer=layer)
        query, key = torch.randn(2, 1, _HEADS, size.length, _HEAD_DIM)
        value = reached.float().expand(1, _HEADS, -1, -1).contiguous()
        key = query if name in BY_CONTENT else key
        out = attend.eval()(query, key, value, context, layer)[0]
        reached = reached | (out[0] > 0).any(0)
    raise RuntimeError(f"{name} has not reached every token after {_MOST_LAYERS} layers")


@torch.no_grad()
def keys_per_query(name: str, length: int, keys: int, *, is_causal: bool) -> float:
    """Mean number of keys of a query; of features and exact keys together for Performers."""
    setting = settings(length, keys, is_causal=is_causal)[name]
    if name in PERFORMERS:
        window, options = setting.get("window"), setting.get("attention_options", {})
        exact = 0 if window is None else window + 1 if is_causal else 2 * window + 1
        return float(setting["num_features"] + exact + options.get("keys", 0))
    torch.manual_seed(0)
    attend = mechanism(setting, _HEADS, _HEAD_DIM, length, is_causal=is_causal).eval()
    query, key, value = torch.randn(3, 1, _HEADS, length, _HEAD_DIM)
    key = query if name in BY_CONTENT else key
    context = AttentionContext(is_causal, need_weights=True)
    weights = attend(query, key, value, context, 0)[1]
    return float((weights > 0).sum(-1).double().mean())
