"""Attention problems with exact pairs, and what they are by their definition.

``dense`` writes the definition out in float64: the matrix of all pairs, exact where the problem
says so and estimated elsewhere, over one normaliser.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.attention.exact_keys.window_and_sinks import SinkKeys
from performers.attention.native import backend
from performers.attention.state import FavorState
from performers.features import FeatureForm
from tests.features.cases import generator


@dataclass
class Exact:
    """One call: inputs ``(B, Hkv, G, L, D)``, ``(B, Hkv, S, D)``, ``(B, Hkv, S, Dv)``.

    ``weight`` and ``bias`` are those of a form; ``first`` is the first query that sees each sink.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor | None
    window: int | None
    causal: bool = True
    mask: Tensor | None = None
    segments: Tensor | None = None
    sink_key: Tensor | None = None
    sink_value: Tensor | None = None
    first: Tensor | None = None
    state: FavorState | None = None
    offset: int = 0
    return_state: bool = False
    trained: bool = False

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that gradients are taken of."""
        tensors = [self.query, self.key, self.value]
        if self.sink_key is not None:
            tensors += [self.sink_key, self.sink_value]
        if self.state is not None:
            tensors += [self.state.key_value, self.state.key_sum]
        if self.trained:
            tensors += [x for x in (self.weight, self.bias) if x is not None]
        return tensors

    def to(self, dtype: torch.dtype) -> "Exact":
        """The same call on fresh leaves of another dtype; sums stay float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)

        def leaf(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if x is None else x.detach().to(dtype).clone().requires_grad_()

        state = self.state
        if state is not None:
            state = FavorState(
                leaf(state.key_value, wide), leaf(state.key_sum, wide), state.log_scale.to(wide)
            )
        return replace(
            self,
            query=leaf(self.query, dtype),
            key=leaf(self.key, dtype),
            value=leaf(self.value, dtype),
            sink_key=leaf(self.sink_key, dtype),
            sink_value=leaf(self.sink_value, dtype),
            weight=leaf(self.weight, wide) if self.trained else self.weight.to(wide),
            bias=leaf(self.bias, wide) if self.trained else _to(self.bias, wide),
            state=state,
        )

    def problem(self) -> AttentionCall:
        """What the backend is given."""
        sinks = None
        if self.sink_key is not None:
            sinks = SinkKeys(
                self.sink_key, self.sink_value, self.first, torch.full_like(self.first, -1)
            )
        rows = self.weight.shape[-2]
        return AttentionCall(
            self.query,
            self.key,
            self.value,
            None,
            is_causal=self.causal,
            key_mask=self.mask,
            window=self.window,
            state=self.state,
            return_state=self.return_state,
        ).replaced(
            form=FeatureForm("exponential", self.weight, self.bias, rows, 1 / rows),
            factor=self.query.shape[-1] ** -0.5,
            segments=self.segments,
            offset=self.offset,
            sink_keys=sinks,
            lists=None,
            dtype=torch.float32,
        )

    def run(self) -> tuple[Tensor, FavorState | None]:
        """The kernels' output and state."""
        return backend.attend(self.problem())


def make(
    length: int,
    window: int | None,
    *,
    causal: bool = True,
    size: int | None = None,
    batch: int = 2,
    key_heads: int = 2,
    groups: int = 1,
    head_dim: int = 16,
    value_dim: int = 8,
    num_features: int = 24,
    num_heads: int = 1,
    bias: bool = False,
    masked: float | None = None,
    lengths: list[int] | None = None,
    sinks: int = 0,
    input_scale: float = 1.0,
    trained: bool = False,
    seed: int = 0,
) -> Exact:
    """A call on Gaussian inputs; with ``sinks`` the first keys of every sequence are its sinks."""
    random = generator(seed)
    size = length if size is None else size
    if lengths is not None:
        batch = 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    segments, starts = None, [0] * batch
    if lengths is not None:
        segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
    key = input_scale * normal(batch, key_heads, size, head_dim)
    value = normal(batch, key_heads, size, value_dim)
    mask = None if masked is None else torch.rand(batch, size, generator=random) < masked
    sink_key = sink_value = first = None
    if sinks:
        mask = torch.ones(batch, size, dtype=torch.bool) if mask is None else mask
        ends = [size] * batch if lengths is None else [*starts[1:], size]
        shape = (len(starts), key_heads, sinks)
        sink_key, sink_value = normal(*shape, head_dim), normal(*shape, value_dim)
        first = torch.full((len(starts), sinks), length)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            row = 0 if lengths is not None else i
            for r in range(min(sinks, end - start)):
                if mask[row, start + r]:
                    sink_key[i, :, r] = key[row, :, start + r]
                    sink_value[i, :, r] = value[row, :, start + r]
                    first[i, r] = start + r if causal else start
                    mask[row, start + r] = False
    return Exact(
        query=input_scale * normal(batch, key_heads, groups, length, head_dim),
        key=key,
        value=value,
        weight=normal(num_heads, num_features, head_dim),
        bias=0.3 * normal(num_heads, num_features) if bias else None,
        window=window,
        causal=causal,
        mask=mask,
        segments=segments,
        sink_key=sink_key,
        sink_value=sink_value,
        first=first,
        trained=trained,
    )


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def dense(call: Exact) -> Tensor:
    """The output by the definition, in the dtype of the call."""
    scale = call.query.shape[-1] ** -0.5
    length, size = call.query.shape[-2], call.key.shape[-2]
    key, value = call.key[:, :, None], call.value[:, :, None]
    position = torch.arange(length) + call.offset
    apart = position[:, None] - torch.arange(size)[None, :]
    allowed = apart >= 0 if call.causal else torch.ones_like(apart, dtype=torch.bool)
    if call.segments is not None:
        allowed = allowed & (call.segments[:, None] == call.segments[None, :])
    allowed = allowed[None, None, None]
    if call.mask is not None:
        allowed = allowed & call.mask[:, None, None, None]
        key = key.where(call.mask[:, None, None, :, None], 0)
        value = value.where(call.mask[:, None, None, :, None], 0)
    near = (apart.abs() <= (-1 if call.window is None else call.window)).expand_as(allowed)
    exact = (call.query @ key.mT) * scale
    log_query, log_key = _log_features(call, call.query), _log_features(call, key)
    if call.weight.shape[-2] * length * size * call.query.shape[2] < 5e7:
        far = torch.logsumexp(log_query.unsqueeze(-2) + log_key.unsqueeze(-3), -1)
    else:
        far = (log_query.exp() @ log_key.exp().mT).log()
    logits = torch.where(near, exact, far - math.log(call.weight.shape[-2]))
    logits = logits.masked_fill(~allowed, -math.inf)
    values = [value]
    if call.sink_key is not None:
        sink_key, sink_value, first = call.sink_key, call.sink_value, call.first
        index = torch.arange(length)[:, None]
        if call.segments is None:
            sees = (index >= first[:, None, :])[:, None, None]
            sink_key, sink_value = sink_key[:, :, None], sink_value[:, :, None]
        else:
            same = call.segments[:, None] == torch.arange(len(first))[None, :]
            sees = (same[:, :, None] & (index[:, :, None] >= first[None])).flatten(1)
            sees = sees[None, None, None]
            sink_key, sink_value = (
                x.transpose(0, 1).flatten(1, 2)[None, :, None] for x in (sink_key, sink_value)
            )
        scores = (call.query @ sink_key.mT) * scale
        logits = torch.cat((logits, scores.masked_fill(~sees, -math.inf)), -1)
        values.append(sink_value)
    peak = logits.detach().amax(-1, keepdim=True)
    if call.state is not None:
        past = log_query + call.state.log_scale[:, :, None, None] - math.log(log_query.shape[-1])
        peak = torch.maximum(peak, past.detach().amax(-1, keepdim=True))
    peak = peak.masked_fill(peak == -math.inf, 0)
    weights = (logits - peak).exp()
    numerator = weights @ torch.cat([x.expand(*x.shape) for x in values], -2)
    normaliser = weights.sum(-1, keepdim=True)
    if call.state is not None:
        phi = (past - peak).exp()
        numerator = numerator + phi @ call.state.key_value[:, :, None]
        normaliser = normaliser + phi @ call.state.key_sum[:, :, None, :, None]
    return numerator / normaliser.where(normaliser > 0, 1)


def _log_features(call: Exact, x: Tensor) -> Tensor:
    """Logarithms of features, ``(B, Hkv, G, T, m)``; their sum over products lacks only 1 / m."""
    x = x * call.query.shape[-1] ** -0.25
    log = x @ call.weight[None, :, None].mT - x.square().sum(-1, keepdim=True) / 2
    return log if call.bias is None else log + call.bias[None, :, None, None]
