"""The Routing Transformer's attention by k-means (Roy et al. 2021, arXiv 2003.05997)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from performers.app.options import option
from performers.features.precision import without_autocast
from performers.models import PerformerConfig
from studies.comparators.blocks import AttentionOptions, SequenceRows, attend_allowed
from studies.comparators.groups import GroupedComparator


@dataclass(frozen=True, kw_only=True)
class RoutingOptions(AttentionOptions):
    """Options of ``routing``."""

    clusters: int | None = option(
        "Centroids of a head; None is the square root of max_position_embeddings, rounded up.",
        None,
        at_least=1,
    )
    window: int = option("Tokens of a cluster seen to each side.", 128, at_least=1)
    decay: float = option(
        "What is left of a centroid after a step of training.", 0.999, at_least=0, at_most=1
    )

    def completed(self, longest: int) -> AttentionOptions:
        """See `AttentionOptions.completed`."""
        return replace(self, clusters=self.clusters or math.isqrt(longest - 1) + 1)


class RoutingMechanism(GroupedComparator):
    """Softmax attention to the tokens of the same cluster.

    Queries are keys too, after layer normalisation without weights: the score is ``q_i . q_j /
    sqrt(head_dim)``. A token belongs to the centroid with the largest inner product, and sees those
    at most ``window`` before or after it among the tokens of its cluster; itself only if it sees no
    other. Centroids are unit vectors, of each head separately; in training each moves by a share of
    ``1 - decay`` towards the mean direction of its tokens.

    The paper gives each centroid the ``L / clusters`` tokens nearest to it. Which these are depends
    on later tokens, and so would what a token sees; the nearest centroid does not, which makes the
    causal form strictly causal. The paper shares queries and keys in the causal form alone.

    ``O(L * (clusters + window))``.
    """

    def __init__(self, options: Any, config: PerformerConfig, generator: Any) -> None:
        super().__init__(options, config, generator)
        self.num_groups, self.reach = options.clusters, options.window
        shape = (config.num_attention_heads, options.clusters, config.head_dim)
        self.centroids = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the centroids from the unit sphere."""
        drawn = torch.randn(self.centroids.shape, generator=generator)
        self.centroids.copy_(F.normalize(drawn, dim=-1))

    def group(self, query: Tensor, rows: SequenceRows) -> Tensor:
        """The cluster of each token; in training the centroids then move."""
        with without_autocast(query.device):
            dtype = torch.promote_types(query.dtype, torch.float32)
            directions = F.normalize(_normalised(query.to(dtype)), dim=-1)
            centroids = self.centroids.to(dtype)
            cluster = (directions @ centroids.mT).argmax(-1)
            if self.training:
                self._move(directions, cluster, centroids, rows)
        return cluster.unsqueeze(2)

    def _move(
        self, directions: Tensor, cluster: Tensor, centroids: Tensor, rows: SequenceRows
    ) -> None:
        members = F.one_hot(cluster, self.num_groups).to(directions.dtype)
        members = members * rows.real[:, None, :, None]
        mean = F.normalize(torch.einsum("nhlc,nhld->hcd", members, directions), dim=-1)
        decay = self.options.decay
        moved = F.normalize(decay * centroids + (1 - decay) * mean, dim=-1)
        self.centroids.copy_(moved)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """See `Comparator.attend`; ``key`` is not used."""
        with without_autocast(query.device):
            dtype = torch.promote_types(query.dtype, torch.float32)
            queries, values = _normalised(query.to(dtype)), value.to(dtype)
            order = self.sort(query, rows)
            difference = order.gaps(order.places[:, :, 0], 0)
            seen, itself = ~order.hidden(difference), difference == 0
            others = seen & ~itself
            out = attend_allowed(
                *(
                    x.flatten(0, 1)
                    for x in (
                        order.blocks(queries, 0),
                        order.seen(queries, 0),
                        order.seen(values, 0),
                        others | (itself & ~others.any(-1, keepdim=True)),
                    )
                )
            )
            return order.join(out.unflatten(0, (len(query), -1)), 0).to(value.dtype)


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])
