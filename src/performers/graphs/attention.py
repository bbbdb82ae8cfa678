"""Attention among the nodes of graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch_geometric.nn.attention import PerformerAttention

from performers.attention import favor_attention
from performers.attention.exact_keys.neighbours import Neighbours
from performers.features import FeatureMap, GeneralizedFeatures
from performers.graphs.structure import graph_boundaries


class GraphAttention(PerformerAttention):
    """``PerformerAttention`` of PyTorch Geometric, whose masks act on both sums.

    ``out = concat_h(favor_attention(x W_q, x W_k, x W_v)) W_o``, each node to all nodes of its
    graph. The output of a graph does not depend on the others of its batch, as it does in PyTorch
    Geometric, which masks the values alone. It is a subclass so that ``isinstance``, and with it
    ``GPSConv``, holds. Parameters have the same names and shapes; the ``state_dict`` of
    PyTorch Geometric's loads with ``strict=False`` (its projection is left out, that of the feature
    map is missing). Source: Choromanski et al. 2021 (arXiv 2009.14794).

    Args:
        channels: Width of the input and the output.
        heads: Number of heads; divides ``channels``.
        head_channels: Width of a head; None: ``channels / heads``.
        kernel: Elementwise ``f`` of ``GeneralizedFeatures(head_channels, fn=f)``; None: ReLU.
        qkv_bias: Whether projections to queries, keys and values have a bias.
        attn_out_bias: Whether the projection to the output has a bias.
        dropout: Dropout probability of the output.
        feature_map: Feature map for ``head_channels``, as ``SoftmaxFeatures(head_channels)``, in
            place of ``kernel``.

    Raises:
        ValueError: ``heads`` does not divide ``channels``, ``feature_map`` is for another width, or
            ``kernel`` is given, too.

    Example:
        >>> attention = GraphAttention(64, heads=4, head_channels=16)
        >>> batch = torch.tensor([0] * 30 + [1] * 20)
        >>> attention(torch.randn(50, 64), batch=batch).shape
        torch.Size([50, 64])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_channels: int | None = 64,
        kernel: Callable[[Tensor], Tensor] | None = None,
        qkv_bias: bool = False,
        attn_out_bias: bool = True,
        dropout: float = 0.0,
        *,
        feature_map: FeatureMap | None = None,
    ) -> None:
        if heads < 1 or channels < 1 or channels % heads:
            raise ValueError(
                f"channels must be a positive multiple of heads, got {channels} and {heads}"
            )
        if head_channels is None:
            head_channels = channels // heads
        if feature_map is None:
            # The name of ReLU is what compiled kernels know it by.
            fn = "relu" if kernel is None or isinstance(kernel, nn.ReLU) else kernel
            feature_map = GeneralizedFeatures(head_channels, fn=fn)
        elif kernel is not None:
            raise ValueError(
                "kernel and feature_map both choose the features: leave kernel out, or pass "
                "feature_map=GeneralizedFeatures(head_channels, fn=kernel)"
            )
        if feature_map.head_dim != head_channels:
            raise ValueError(
                f"feature_map must have head_dim={head_channels} (head_channels), "
                f"got {feature_map.head_dim}"
            )
        # PyTorch Geometric's would draw features that are not used.
        nn.Module.__init__(self)
        self.feature_map = feature_map
        self.channels, self.heads, self.head_channels = channels, heads, head_channels
        inner = heads * head_channels
        self.q = nn.Linear(channels, inner, bias=qkv_bias)
        self.k = nn.Linear(channels, inner, bias=qkv_bias)
        self.v = nn.Linear(channels, inner, bias=qkv_bias)
        self.attn_out = nn.Linear(inner, channels, bias=attn_out_bias)
        self.dropout = nn.Dropout(dropout)

    # That of PyTorch Geometric shows the kernel in place of the features.
    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.channels}, heads={self.heads}, head_channels={self.head_channels}"

    def reset_parameters(self) -> None:
        """Set all parameters and buffers as at construction, features included."""
        self.feature_map.reset_parameters()
        for layer in (self.q, self.k, self.v, self.attn_out):
            layer.reset_parameters()

    # The name in PyTorch Geometric.
    _reset_parameters = reset_parameters

    def redraw_projection_matrix(self, generator: torch.Generator | None = None) -> None:
        """Draw a fresh projection; the method of PyTorch Geometric, as ``feature_map.redraw_``."""
        self.feature_map.redraw_(generator)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        batch: Tensor | None = None,
        neighbours: Neighbours | None = None,
        neighbour_bias: Tensor | None = None,
    ) -> Tensor:
        """Compute attention among the nodes of each graph.

        Args:
            x: Nodes of shape ``(B, N, channels)``, a graph in each row, or ``(N, channels)``, the
                graphs one after the other, without padding.
            mask: Bool, shape ``(B, N)``, True = a node and no padding; for the first shape. Rows of
                the output at padding mean nothing.
            batch: The graph of each node, shape ``(N,)``, sorted, for the second shape; None: one
                graph.
            neighbours: As in ``favor_attention``, for a ``feature_map`` of positive softmax
                features; `neighbour_lists` makes them from edges.
            neighbour_bias: As in ``favor_attention``, shape ``(E,)`` or ``(heads, E)``.

        Returns:
            The shape of ``x``.

        Raises:
            ValueError: A shape does not fit, ``batch`` is not sorted, or ``neighbours`` do not go
                with the features.
        """
        if x.ndim not in (2, 3) or x.shape[-1] != self.channels:
            raise ValueError(
                f"x must have shape (B, N, {self.channels}) or (N, {self.channels}), got "
                f"{tuple(x.shape)}"
            )
        if x.ndim == 3 and batch is not None:
            raise ValueError("batch is for nodes (N, channels); rows (B, N, channels): mask")
        if x.ndim == 2 and mask is not None:
            raise ValueError("mask is for rows (B, N, channels); nodes (N, channels) have batch")
        if batch is not None and batch.shape != x.shape[:1]:
            raise ValueError(f"batch must have shape ({x.shape[0]},), got {tuple(batch.shape)}")
        rows = x.unsqueeze(0) if x.ndim == 2 else x
        query, key, value = (
            layer(rows).unflatten(-1, (self.heads, self.head_channels)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        out = favor_attention(
            query,
            key,
            value,
            self.feature_map,
            key_mask=mask,
            cu_seqlens=None if batch is None else graph_boundaries(batch),
            neighbours=neighbours,
            neighbour_bias=neighbour_bias,
        )
        out = self.dropout(self.attn_out(out.transpose(1, 2).flatten(2)))
        return out.squeeze(0) if x.ndim == 2 else out
