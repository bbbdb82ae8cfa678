"""Lost causal rows, each computed again at the scale of what it sees, pair by pair in float32.

A row sees the sums before its chunk and keys of its chunk. Programs of chunks without lost rows
return at once.
"""

import triton
import triton.language as tl

from performers.attention.triton.kernels.chunks import seen_pairs
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
    key_place,
    load_rows,
    place_of,
    poison,
    previous_segment,
    steps,
    store_rows,
)


@triton.jit
def feature_of(HI, LO, at, BD: tl.constexpr, SPLIT: tl.constexpr):
    """One row of the projection, float32."""
    place = at * BD + tl.arange(0, BD)
    w = tl.load(HI + place).to(tl.float32)
    if SPLIT:
        w += tl.load(LO + place).to(tl.float32)
    return w


@triton.jit(do_not_specialize=["first", "length", "delay", "chunks", "features", "count"])
def mend_rows(
    Q, K, V, NORM, SEG, HI, LO, BIAS, KV, KS, SCALE, PART_OUT, PART_LOG, OUT, LOG, LOST,
    sqb, sqh, sqg, sql, skb, skh, sks, svb, svh, svs, spb, sph, spg, spl, sob, soh, sog, sol,
    heads, groups, first, length, delay, chunks, features, count,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    STRICT: tl.constexpr, MERGE: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Output and logarithms of the lost rows among ``BR`` rows of a chunk of ``BT``."""
    tiles: tl.constexpr = BT // BR
    tile = tl.program_id(0) % tiles
    g = (tl.program_id(0) // tiles % groups).to(tl.int64)
    chunk = tl.program_id(0) // tiles // groups % chunks
    local = (tl.program_id(0) // tiles // groups // chunks).to(tl.int64)
    n = first + local
    start = chunk * BT
    r = tile * BR + tl.arange(0, BR)
    row_step = -r if REVERSE else r
    inside = start + r < length
    i = place_of(start, length, REVERSE)
    row = (n * groups + g) * length + i
    # Those of float32 inputs are not computed by themselves before.
    least: tl.constexpr = 2 if SPLIT else 1
    lost = tl.load(LOST + row + row_step, mask=inside, other=0) >= least
    if tl.max(lost.to(tl.int32), 0) > 0:
        t = tl.arange(0, BT)
        step = steps(BT, REVERSE)
        there = start + t < length
        j = key_place(start, length, delay, REVERSE)
        norm = tl.load(NORM + (n * length + start) + t, mask=there, other=INFINITY)
        taking = norm < INFINITY
        to = Q + head_of(n, heads, sqb, sqh) + (g * sqg + i * sql)
        q = load_rows(to, row_step, sql, inside, D, BD).to(tl.float32)
        k = load_rows(K + head_of(n, heads, skb, skh) + j * sks, step, sks, taking, D, BD)
        k = k.to(tl.float32)
        own_row = tl.load(SEG + i + row_step, mask=inside, other=-2) if HAS_SEG else r
        own_key = tl.load(SEG + i + step, mask=there, other=-3) if HAS_SEG else t
        continues = own_row == previous_segment(SEG, start, length, HAS_SEG, REVERSE)
        seen = seen_pairs(r, t, own_row, own_key, STRICT, HAS_SEG)
        featured = seen & (norm < LARGEST_NORM)[None, :]
        peak = tl.full((BR,), LOWEST, tl.float32)
        den = tl.zeros((BR,), tl.float32)
        acc = tl.zeros((BR, BV), tl.float32)
        if MERGE:
            part_log = tl.load(PART_LOG + row + row_step, mask=inside, other=-INFINITY)
            peak = tl.maximum(peak, tl.ceil(part_log))
        w = n % heads * features if PER_HEAD else 0
        state = (local * chunks + chunk) * features
        scales = (local * (chunks + 1) + chunk) * features
        for f in range(0, count):
            weight = feature_of(HI, LO, w + f, BD, SPLIT)
            bias = tl.load(BIAS + w + f)
            zq, zk = tl.sum(q * weight[None, :], 1), tl.sum(k * weight[None, :], 1)
            eq = logarithms(zq, bias, 0.0, FORM, EPSILON)
            ek = logarithms(zk, bias, -norm, FORM, EPSILON)
            best = tl.max(tl.where(featured, ek[None, :], -INFINITY), 1)
            past = tl.load(SCALE + scales + f)
            if HAS_SEG:
                best = tl.maximum(best, tl.where(continues, past, LOWEST))
            else:
                best = tl.maximum(best, past)
            peak = tl.maximum(peak, tl.ceil(eq + best))
        if MERGE:
            den = tl.exp2(part_log - peak)
            to = PART_OUT + head_of(n, heads, spb, sph) + (g * spg + i * spl)
            acc = load_rows(to, row_step, spl, inside, DV, BV) * den[:, None]
        c = tl.arange(0, BV)
        pairs = tl.zeros((BR, BT), tl.float32)
        for f in range(0, count):
            weight = feature_of(HI, LO, w + f, BD, SPLIT)
            bias = tl.load(BIAS + w + f)
            zq, zk = tl.sum(q * weight[None, :], 1), tl.sum(k * weight[None, :], 1)
            eq = logarithms(zq, bias, 0.0, FORM, EPSILON) - peak
            ek = logarithms(zk, bias, -norm, FORM, EPSILON)
            pairs += tl.where(featured, tl.exp2(eq[:, None] + ek[None, :]), 0.0)
            far = tl.exp2(eq + tl.load(SCALE + scales + f))
            kv = tl.load(KV + (state + f) * DV + c, mask=c < DV, other=0.0)
            ks = tl.load(KS + state + f)
            if HAS_SEG:
                acc += tl.where(continues[:, None], far[:, None] * kv[None, :], 0.0)
                den += tl.where(continues, far * ks, 0.0)
            else:
                acc += far[:, None] * kv[None, :]
                den += far * ks
        pairs += tl.where(seen, poison(norm)[None, :], 0.0)
        v = load_rows(V + head_of(n, heads, svb, svh) + j * svs, step, svs, taking, DV, BV)
        acc = dot(pairs, v.to(tl.float32), acc, PRECISION)
        den += tl.sum(pairs, 1)
        acc, log = finished(acc, den, peak, is_broken(q))
        to = OUT + head_of(n, heads, sob, soh) + (g * sog + i * sol)
        store_rows(to, row_step, sol, acc, lost, DV, BV)
        tl.store(LOG + row + row_step, log, mask=lost)


@triton.jit(do_not_specialize=["first", "length", "delay", "chunks", "features", "count"])
def mend_query_gradients(
    Q, K, V, NORM, SEG, GRAD_OUT, DELTA, LOG, LOST, HI, LO, BIAS, KV, KS, SCALE, GRAD_Q,
    sqb, sqh, sqg, sql, skb, skh, sks, svb, svh, svs, sgb, sgh, sgg, sgl, sxb, sxh, sxg, sxl,
    heads, groups, first, length, delay, chunks, features, pull, count,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    STRICT: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Add the gradients of the lost rows among ``BR`` rows of a chunk of ``BT``."""
    tiles: tl.constexpr = BT // BR
    tile = tl.program_id(0) % tiles
    g = (tl.program_id(0) // tiles % groups).to(tl.int64)
    chunk = tl.program_id(0) // tiles // groups % chunks
    local = (tl.program_id(0) // tiles // groups // chunks).to(tl.int64)
    n = first + local
    start = chunk * BT
    r = tile * BR + tl.arange(0, BR)
    row_step = -r if REVERSE else r
    inside = start + r < length
    i = place_of(start, length, REVERSE)
    row = (n * groups + g) * length + i
    lost = tl.load(LOST + row + row_step, mask=inside, other=0) != 0
    if tl.max(lost.to(tl.int32), 0) > 0:
        t = tl.arange(0, BT)
        step = steps(BT, REVERSE)
        there = start + t < length
        j = key_place(start, length, delay, REVERSE)
        norm = tl.load(NORM + (n * length + start) + t, mask=there, other=INFINITY)
        taking = norm < INFINITY
        to = Q + head_of(n, heads, sqb, sqh) + (g * sqg + i * sql)
        q = load_rows(to, row_step, sql, inside, D, BD).to(tl.float32)
        k = load_rows(K + head_of(n, heads, skb, skh) + j * sks, step, sks, taking, D, BD)
        v = load_rows(V + head_of(n, heads, svb, svh) + j * svs, step, svs, taking, DV, BV)
        k = k.to(tl.float32)
        to = GRAD_OUT + head_of(n, heads, sgb, sgh) + (g * sgg + i * sgl)
        grad = load_rows(to, row_step, sgl, inside, DV, BV).to(tl.float32)
        log = tl.load(LOG + row + row_step, mask=inside, other=INFINITY)
        delta = tl.load(DELTA + row + row_step, mask=inside, other=0.0)
        own_row = tl.load(SEG + i + row_step, mask=inside, other=-2) if HAS_SEG else r
        own_key = tl.load(SEG + i + step, mask=there, other=-3) if HAS_SEG else t
        continues = own_row == previous_segment(SEG, start, length, HAS_SEG, REVERSE)
        seen = seen_pairs(r, t, own_row, own_key, STRICT, HAS_SEG)
        seen = seen & (norm < LARGEST_NORM)[None, :]
        slope = dot(grad, tl.trans(v.to(tl.float32)), tl.zeros((BR, BT), tl.float32), PRECISION)
        slope = tl.where(seen, slope - delta[:, None], 0.0)
        dq = tl.zeros((BR, BD), tl.float32)
        along = tl.zeros((BR,), tl.float32)
        w = n % heads * features if PER_HEAD else 0
        state = (local * chunks + chunk) * features
        scales = (local * (chunks + 1) + chunk) * features
        c = tl.arange(0, BV)
        for f in range(0, count):
            weight = feature_of(HI, LO, w + f, BD, SPLIT)
            bias = tl.load(BIAS + w + f)
            zq, zk = tl.sum(q * weight[None, :], 1), tl.sum(k * weight[None, :], 1)
            eq = logarithms(zq, bias, 0.0, FORM, EPSILON) - log
            ek = logarithms(zk, bias, -norm, FORM, EPSILON)
            pairs = tl.where(seen, tl.exp2(eq[:, None] + ek[None, :]), 0.0)
            kv = tl.load(KV + (state + f) * DV + c, mask=c < DV, other=0.0)
            far = tl.sum(grad * kv[None, :], 1) - delta * tl.load(KS + state + f)
            far = far * tl.exp2(eq + tl.load(SCALE + scales + f))
            if HAS_SEG:
                far = tl.where(continues, far, 0.0)
            h = tl.sum(pairs * slope, 1) + far
            h = times_slope(h, zq, bias, FORM, EPSILON)
            dq += h[:, None] * weight[None, :]
            along += h
        dq = dq * LN2 - q * (along * pull)[:, None]
        GRAD_Q += head_of(n, heads, sxb, sxh) + (g * sxg + i * sxl)
        dq += load_rows(GRAD_Q, row_step, sxl, lost, D, BD)
        store_rows(GRAD_Q, row_step, sxl, dq, lost, D, BD)


@triton.jit(do_not_specialize=["first", "length", "delay", "chunks", "features", "count"])
def mend_key_gradients(
    Q, K, V, NORM, SEG, GRAD_OUT, DELTA, LOG, LOST, HI, LO, BIAS, GRAD_K, GRAD_V,
    sqb, sqh, sqg, sql, skb, skh, sks, svb, svh, svs, sgb, sgh, sgg, sgl,
    sxb, sxh, sxs, syb, syh, sys,
    heads, groups, first, length, delay, chunks, features, pull, count,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    STRICT: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Add what the lost rows of a chunk give to the gradients of ``BR`` of its keys and values."""
    tiles: tl.constexpr = BT // BR
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles % chunks
    local = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    n = first + local
    start = chunk * BT
    t = tl.arange(0, BT)
    step = steps(BT, REVERSE)
    there = start + t < length
    i = place_of(start, length, REVERSE)
    for g in range(0, groups):
        row = (n * groups + g) * length + i
        lost = tl.load(LOST + row + step, mask=there, other=0) != 0
        if tl.max(lost.to(tl.int32), 0) > 0:
            r = tile * BR + tl.arange(0, BR)
            key_step = -r if REVERSE else r
            inside = start + r < length
            j = key_place(start, length, delay, REVERSE)
            norm = tl.load(NORM + (n * length + start) + r, mask=inside, other=INFINITY)
            taking = norm < INFINITY
            to = K + head_of(n, heads, skb, skh) + j * sks
            k = load_rows(to, key_step, sks, norm < LARGEST_NORM, D, BD).to(tl.float32)
            to = V + head_of(n, heads, svb, svh) + j * svs
            v = load_rows(to, key_step, svs, taking, DV, BV).to(tl.float32)
            to = Q + head_of(n, heads, sqb, sqh) + (g * sqg + i * sql)
            q = load_rows(to, step, sql, there, D, BD).to(tl.float32)
            to = GRAD_OUT + head_of(n, heads, sgb, sgh) + (g * sgg + i * sgl)
            grad = load_rows(to, step, sgl, there, DV, BV).to(tl.float32)
            log = tl.load(LOG + row + step, mask=there, other=INFINITY)
            log = tl.where(lost, log, INFINITY)
            delta = tl.load(DELTA + row + step, mask=there, other=0.0)
            own_key = tl.load(SEG + i + key_step, mask=inside, other=-2) if HAS_SEG else r
            own_row = tl.load(SEG + i + step, mask=there, other=-3) if HAS_SEG else t
            seen = seen_pairs(t, r, own_row, own_key, STRICT, HAS_SEG)
            seen = seen & (norm < LARGEST_NORM)[None, :]
            slope = dot(grad, tl.trans(v), tl.zeros((BT, BR), tl.float32), PRECISION)
            slope = tl.where(seen, slope - delta[:, None], 0.0)
            dk = tl.zeros((BR, BD), tl.float32)
            along = tl.zeros((BR,), tl.float32)
            pairs = tl.zeros((BT, BR), tl.float32)
            w = n % heads * features if PER_HEAD else 0
            for f in range(0, count):
                weight = feature_of(HI, LO, w + f, BD, SPLIT)
                bias = tl.load(BIAS + w + f)
                zq, zk = tl.sum(q * weight[None, :], 1), tl.sum(k * weight[None, :], 1)
                eq = logarithms(zq, bias, 0.0, FORM, EPSILON) - log
                ek = logarithms(zk, bias, -norm, FORM, EPSILON)
                more = tl.where(seen, tl.exp2(eq[:, None] + ek[None, :]), 0.0)
                pairs += more
                h = tl.sum(more * slope, 0)
                h = times_slope(h, zk, bias, FORM, EPSILON)
                dk += h[:, None] * weight[None, :]
                along += h
            dk = dk * LN2 - k * (along * pull)[:, None]
            dv = dot(tl.trans(pairs), grad, tl.zeros((BR, BV), tl.float32), PRECISION)
            to = GRAD_K + head_of(n, heads, sxb, sxh) + j * sxs
            dk += load_rows(to, key_step, sxs, taking, D, BD)
            store_rows(to, key_step, sxs, dk, taking, D, BD)
            to = GRAD_V + head_of(n, heads, syb, syh) + j * sys
            dv += load_rows(to, key_step, sys, taking, DV, BV)
            store_rows(to, key_step, sys, dv, taking, DV, BV)
