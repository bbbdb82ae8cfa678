"""Bidirectional rows: queries against the sums over all keys, and gradients of both sides."""

import triton
import triton.language as tl

from performers.attention.triton.kernels.forms import logarithms, times_slope
from performers.attention.triton.kernels.parts import (
    INFINITY,
    LARGEST_NORM,
    LN2,
    LOWEST,
    dot,
    finished,
    head_of,
    is_broken,
    load_rows,
    load_sums,
    project_rows,
    store_rows,
    times_sums,
)


@triton.jit(do_not_specialize=["length", "features"])
def read_rows(
    Q, HI, LO, BIAS, KV, KS, SCALE, OUT, LOG,
    sqb, sqh, sqg, sql, sob, soh, sog, sol, heads, groups, length, features,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Output rows, and binary logarithms of their normalisers."""
    blocks = tl.cdiv(length, BT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.arange(0, BT)
    start = tl.program_id(0) % blocks * BT
    inside = start + i < length
    n, g = row // groups, row % groups
    start = start.to(tl.int64)
    first = row * length + start
    q = load_rows(Q + head_of(n, heads, sqb, sqh) + (g * sqg + start * sql), i, sql, inside, D, BD)
    broken = is_broken(q)
    w = n % heads * features if PER_HEAD else 0
    sums = n * features
    peak = tl.full((BT,), LOWEST, tl.float32)
    den = tl.zeros((BT,), tl.float32)
    acc = tl.zeros((BT, BV), tl.float32)
    for f0 in range(0, features, BM):
        f = f0 + tl.arange(0, BM)
        at = (w + f)[:, None] * BD + tl.arange(0, BD)[None, :]
        z = project_rows(q, tl.load(HI + at), LO, at, PRECISION, SPLIT)
        bias, scale = tl.load(BIAS + w + f), tl.load(SCALE + sums + f)
        e = logarithms(z, bias[None, :], scale[None, :], FORM, EPSILON)
        new = tl.maximum(peak, tl.ceil(tl.max(e, 1)))
        decay = tl.exp2(peak - new)
        phi = tl.exp2(e - new[:, None]).to(OPERAND)
        kv = load_sums(KV + sums * DV, f, DV, BV)
        acc = times_sums(phi, kv, acc * decay[:, None], PRECISION)
        den = den * decay + tl.sum(phi.to(tl.float32) * tl.load(KS + sums + f)[None, :], 1)
        peak = new
    acc, log = finished(acc, den, peak, broken)
    store_rows(
        OUT + head_of(n, heads, sob, soh) + (g * sog + start * sol), i, sol, acc, inside, DV, BV
    )
    tl.store(LOG + first + i, log, mask=inside)


@triton.jit(do_not_specialize=["length", "features"])
def query_gradients(
    Q, GRAD_OUT, DELTA, LOG, HI, LO, BIAS, KV, KS, SCALE, GRAD_Q,
    sqb, sqh, sqg, sql, sgb, sgh, sgg, sgl, sxb, sxh, sxg, sxl,
    heads, groups, length, features, pull,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """``grad_q_i = sum_f a_if (grad_out_i . kv_f - delta_i ks_f) (ln 2 W_f - pull q_i)``."""
    blocks = tl.cdiv(length, BT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.arange(0, BT)
    start = tl.program_id(0) % blocks * BT
    inside = start + i < length
    n, g = row // groups, row % groups
    start = start.to(tl.int64)
    first = row * length + start
    q = load_rows(Q + head_of(n, heads, sqb, sqh) + (g * sqg + start * sql), i, sql, inside, D, BD)
    grad = load_rows(
        GRAD_OUT + head_of(n, heads, sgb, sgh) + (g * sgg + start * sgl), i, sgl, inside, DV, BV
    )
    grad = grad.to(OPERAND)
    log = tl.load(LOG + first + i, mask=inside, other=INFINITY)
    delta = tl.load(DELTA + first + i, mask=inside, other=0.0)
    w = n % heads * features if PER_HEAD else 0
    sums = n * features
    dx = tl.zeros((BT, BD), tl.float32)
    along = tl.zeros((BT,), tl.float32)
    for f0 in range(0, features, BM):
        f = f0 + tl.arange(0, BM)
        at = (w + f)[:, None] * BD + tl.arange(0, BD)[None, :]
        hi = tl.load(HI + at)
        z = project_rows(q, hi, LO, at, PRECISION, SPLIT)
        bias, scale = tl.load(BIAS + w + f), tl.load(SCALE + sums + f)
        e = logarithms(z, bias[None, :], scale[None, :], FORM, EPSILON) - log[:, None]
        kv = load_sums(KV + sums * DV, f, DV, BV).to(OPERAND)
        slope = delta[:, None] * -tl.load(KS + sums + f)[None, :]
        h = tl.exp2(e) * dot(grad, tl.trans(kv), slope, PRECISION)
        h = times_slope(h, z, bias[None, :], FORM, EPSILON)
        dx = dot(h.to(OPERAND), hi.to(OPERAND), dx, PRECISION)
        along += tl.sum(h, 1)
    dx = dx * LN2 - q.to(tl.float32) * (along * pull)[:, None]
    GRAD_Q += head_of(n, heads, sxb, sxh) + (g * sxg + start * sxl)
    store_rows(GRAD_Q, i, sxl, dx, inside, D, BD)


@triton.jit(do_not_specialize=["length", "features"])
def key_gradients(
    K, V, NORM, HI, LO, BIAS, SCALE, GRAD_KV, GRAD_KS, GRAD_K, GRAD_V,
    skb, skh, sks, svb, svh, svs, sxb, sxh, sxs, syb, syh, sys,
    heads, length, features, pull,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """``grad_v_j = sum_f phi_jf dkv_f``, and the gradient of ``k_j`` through its features."""
    blocks = tl.cdiv(length, BT)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.arange(0, BT)
    start = tl.program_id(0) % blocks * BT
    inside = start + j < length
    start = start.to(tl.int64)
    norm = tl.load(NORM + (n * length + start) + j, mask=inside, other=INFINITY)
    taking = norm < INFINITY
    k = load_rows(K + (head_of(n, heads, skb, skh) + start * sks), j, sks, taking, D, BD)
    v = load_rows(V + (head_of(n, heads, svb, svh) + start * svs), j, svs, taking, DV, BV).to(
        OPERAND
    )
    absent = norm >= LARGEST_NORM
    k = tl.where(absent[:, None], 0.0, k).to(k.dtype)
    w = n % heads * features if PER_HEAD else 0
    sums = n * features
    dk = tl.zeros((BT, BD), tl.float32)
    dv = tl.zeros((BT, BV), tl.float32)
    along = tl.zeros((BT,), tl.float32)
    for f0 in range(0, features, BM):
        f = f0 + tl.arange(0, BM)
        at = (w + f)[:, None] * BD + tl.arange(0, BD)[None, :]
        hi = tl.load(HI + at)
        z = project_rows(k, hi, LO, at, PRECISION, SPLIT)
        bias, scale = tl.load(BIAS + w + f), tl.load(SCALE + sums + f)
        e = logarithms(z, bias[None, :], -scale[None, :], FORM, EPSILON) - norm[:, None]
        phi = tl.exp2(tl.where(absent[:, None], -INFINITY, e))
        dkv = load_sums(GRAD_KV + sums * DV, f, DV, BV).to(OPERAND)
        slope = tl.zeros((BT, BM), tl.float32) + tl.load(GRAD_KS + sums + f)[None, :]
        h = phi * dot(v, tl.trans(dkv), slope, PRECISION)
        h = times_slope(h, z, bias[None, :], FORM, EPSILON)
        dk = dot(h.to(OPERAND), hi.to(OPERAND), dk, PRECISION)
        dv = dot(phi.to(OPERAND), dkv, dv, PRECISION)
        along += tl.sum(h, 1)
    dk = dk * LN2 - k.to(tl.float32) * (along * pull)[:, None]
    GRAD_K += head_of(n, heads, sxb, sxh) + start * sxs
    GRAD_V += head_of(n, heads, syb, syh) + start * sys
    store_rows(GRAD_K, j, sxs, dk, inside, D, BD)
    store_rows(GRAD_V, j, sys, dv, inside, DV, BV)
