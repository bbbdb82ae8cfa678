"""A single position: the state gains its key, and its queries read the state."""

import triton
import triton.language as tl

from performers.attention.triton.kernels.forms import logarithms
from performers.attention.triton.kernels.parts import INFINITY, LN2, LOG2_E, LOWEST, head_of


@triton.jit
def natural_logarithms(z, bias, offset, FORM: tl.constexpr, EPSILON: tl.constexpr):
    """``ln phi + offset`` of the projections ``z + bias``."""
    if FORM == "exponential" and EPSILON == 0.0:
        return z + (bias + offset)
    else:
        return logarithms(z * LOG2_E, bias * LOG2_E, 0.0, FORM, EPSILON) * LN2 + offset


@triton.jit
def decode_step(
    Q, K, V, MASK, WEIGHT, BIAS, KV, KS, SCALE, OUT, NEW_KV, NEW_KS, NEW_SCALE,
    sqb, sqh, sqg, skb, skh, svb, svh, sob, soh, sog, heads, groups, features, root, norm,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BW: tl.constexpr,
    BG: tl.constexpr, BM: tl.constexpr, PER_HEAD: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_PAST: tl.constexpr, FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """``BV`` columns of the values of one key head, and of the output of its ``groups`` queries.

    Scales are natural logarithms, as in ``FavorState``: one that a step leaves as it is stays the
    same number. Sums of features that are no exponentials have the scale zero.
    """
    columns = tl.cdiv(DV, BV)
    part = tl.program_id(0) % columns
    n = (tl.program_id(0) // columns).to(tl.int64)
    d = tl.arange(0, BD)
    c = part * BV + tl.arange(0, BV)
    k = tl.load(K + head_of(n, heads, skb, skh) + d, mask=d < D, other=0.0).to(tl.float32)
    every = tl.arange(0, BW)
    values = V + head_of(n, heads, svb, svh)
    v = tl.load(values + c, mask=c < DV, other=0.0).to(tl.float32)
    whole = tl.load(values + every, mask=every < DV, other=0.0).to(tl.float32)
    square = tl.sum(k * k, 0)
    half = tl.where(square < 3e38, square * norm, tl.where(norm > 0.0, INFINITY, 0.0))
    broken = tl.sum(k * 0.0, 0) + tl.sum(whole * 0.0, 0)
    if HAS_MASK:
        keep = tl.load(MASK + n // heads) != 0
        half = tl.where(keep, half, INFINITY)
        broken = tl.where(keep, broken, 0.0)
    # What a key without features holds does not matter.
    k = tl.where(tl.zeros((BD,), tl.float32) + half < INFINITY, k, 0.0)
    v = tl.where(tl.zeros((BV,), tl.float32) + half < INFINITY, v, 0.0)
    v = tl.where(v * 0.0 == 0.0, v, 0.0)
    Q += head_of(n, heads, sqb, sqh)
    g_all = tl.arange(0, BG)
    peak = tl.full((BG,), LOWEST, tl.float32)
    den = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BV), tl.float32)
    w = n % heads * features if PER_HEAD else 0
    for f0 in range(0, features, BM):
        f = f0 + tl.arange(0, BM)
        there = f < features
        mask = there[:, None] & (d < D)[None, :]
        weight = tl.load(WEIGHT + (w + f)[:, None] * D + d[None, :], mask=mask, other=0.0)
        weight = weight * root
        bias = tl.zeros((BM,), tl.float32)
        if HAS_BIAS:
            bias = tl.load(BIAS + w + f, mask=there, other=0.0)
        at = n * features + f
        kept = there[:, None] & (c < DV)[None, :]
        ek = natural_logarithms(tl.sum(weight * k[None, :], 1), bias, -half, FORM, EPSILON)
        ek = tl.where(there, ek, -INFINITY)
        scale = ek
        if FORM != "exponential":
            scale = tl.zeros((BM,), tl.float32)
        kv = tl.zeros((BM, BV), tl.float32)
        ks = tl.zeros((BM,), tl.float32)
        if HAS_PAST:
            before = tl.load(SCALE + at, mask=there, other=-INFINITY)
            if FORM == "exponential":
                scale = tl.maximum(before, ek)
            decay = tl.exp(before - tl.where(scale == -INFINITY, 0.0, scale))
            kv = tl.load(KV + at[:, None] * DV + c[None, :], mask=kept, other=0.0)
            kv = kv * decay[:, None]
            ks = tl.load(KS + at, mask=there, other=0.0) * decay
        phi = tl.exp(ek - tl.where(scale == -INFINITY, 0.0, scale)) + broken
        kv += phi[:, None] * v[None, :]
        ks += phi
        tl.store(NEW_KV + at[:, None] * DV + c[None, :], kv, mask=kept)
        if part == 0:
            tl.store(NEW_KS + at, ks, mask=there)
            tl.store(NEW_SCALE + at, scale, mask=there)
        for g in range(0, groups):
            q = tl.load(Q + g * sqg + d, mask=d < D, other=0.0).to(tl.float32)
            e = natural_logarithms(tl.sum(weight * q[None, :], 1), bias, scale, FORM, EPSILON)
            e = tl.where(there, e, -INFINITY)
            mine = g_all == g
            old = tl.max(tl.where(mine, peak, -INFINITY), 0)
            new = tl.maximum(old, tl.max(e, 0))
            shrink = tl.exp(old - new)
            p = tl.where(there, tl.exp(e - new), 0.0)
            more = tl.sum(p[:, None] * kv, 0)
            acc = tl.where(mine[:, None], acc * shrink + more[None, :], acc)
            den = tl.where(mine, den * shrink + tl.sum(p * ks, 0), den)
            peak = tl.where(mine, new, peak)
    to = OUT + head_of(n, heads, sob, soh)
    for g in range(0, groups):
        q = tl.load(Q + g * sqg + d, mask=d < D, other=0.0).to(tl.float32)
        zero = tl.sum(q * 0.0, 0)
        mine = g_all == g
        total = tl.sum(tl.where(mine, den, 0.0), 0)
        out = tl.sum(tl.where(mine[:, None], acc, 0.0), 0) / tl.where(total == 0, 1.0, total)
        # A sum that is NaN is one of every column.
        out += tl.where((total == total) & (zero == zero), 0.0, float("nan"))
        tl.store(to + g * sog + c, out.to(OUT.dtype.element_ty), mask=c < DV)
