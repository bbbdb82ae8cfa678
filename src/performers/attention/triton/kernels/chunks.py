"""Causal rows, chunk by chunk: the sums over the keys before a chunk, and the pairs within it.

Within a chunk, feature ``f`` has the larger of the scales before it and of its own keys, the later
ones included. A row whose normaliser is below ``SMALLEST`` at that scale may have lost keys to
underflow: it is marked 1, or 2 if that is so at the scale of the keys up to its own too, and
``mend.py`` computes it again. Backward kernels leave such rows out.
"""

import triton
import triton.language as tl

from performers.attention.triton.kernels.forms import logarithms, times_slope
from performers.attention.triton.kernels.parts import (
    INFINITY,
    LARGEST_NORM,
    LN2,
    LOWEST,
    SMALLEST,
    dot,
    finished,
    head_of,
    is_broken,
    key_place,
    load_rows,
    load_sums,
    on_grid,
    place_of,
    poison,
    previous_segment,
    project_chunk,
    steps,
    store_rows,
    times_sums,
)


@triton.jit
def seen_pairs(rows, keys, own_row, own_key, STRICT: tl.constexpr, HAS_SEG: tl.constexpr):
    """Mask of the keys that each row of a chunk sees."""
    if STRICT:
        seen = rows[:, None] > keys[None, :]
    else:
        seen = rows[:, None] >= keys[None, :]
    if HAS_SEG:
        seen = seen & (own_row[:, None] == own_key[None, :])
    return seen


@triton.jit(do_not_specialize=["again", "first", "length", "delay", "chunks", "features"])
def chunk_rows(
    Q, K, V, NORM, SEG, HI, LO, BIAS, KV, KS, SCALE, PART_OUT, PART_LOG, OUT, LOG, LOST,
    sqb, sqh, sqg, sql, skb, skh, sks, svb, svh, svs, spb, sph, spg, spl, sob, soh, sog, sol,
    again, heads, groups, first, length, delay, chunks, features,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    STRICT: tl.constexpr, MERGE: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Output rows of one chunk, logarithms of their normalisers, and which rows are lost.

    With ``MERGE``, a part of each row computed before is taken in under one normaliser. A second
    launch, ``again``, computes each lost row by itself, from the keys that it may see: one that
    only later keys made lose its pairs is then what it would be without them, to the last bit.
    """
    g = (tl.program_id(0) % groups).to(tl.int64)
    chunk = tl.program_id(0) // groups % chunks
    local = (tl.program_id(0) // groups // chunks).to(tl.int64)
    n = first + local
    start = chunk * BT
    i = place_of(start, length, REVERSE)
    j = key_place(start, length, delay, REVERSE)
    Q += head_of(n, heads, sqb, sqh) + (g * sqg + i * sql)
    K += head_of(n, heads, skb, skh) + j * sks
    row = (n * groups + g) * length + i
    # The last key that is summed: of the chunk, or one after the other. Triton up to 3.5 compiles
    # no loop whose first value comes out of an `if`.
    within = (again > 0) & (start + tl.arange(0, BT) < length)
    lost = tl.load(LOST + row + steps(BT, REVERSE), mask=within, other=0).to(tl.int32)
    begin = tl.where(again > 0, tl.where(tl.max(lost, 0) > 0, 0, BT), BT - 1)
    for t in range(begin, BT):
        at_t = LOST + row + (-t if REVERSE else t)
        mark = tl.load(at_t, mask=(again > 0) & (start + t < length), other=0).to(tl.int32)
        if (again == 0) | (mark > 0):
            # Marks are below 4. What depends on one is not kept in registers from before the loop.
            r = tl.arange(0, BT) + mark // 4
            step = -r if REVERSE else r
            inside = start + r < length
            q = load_rows(Q, step, sql, inside, D, BD)
            broken = is_broken(q)
            norm = tl.load(NORM + (n * length + start) + r, mask=inside & (r <= t), other=INFINITY)
            taking = norm < INFINITY
            k = load_rows(K, step, sks, taking, D, BD)
            peak = tl.full((BT,), LOWEST, tl.float32)
            den = tl.zeros((BT,), tl.float32)
            acc = tl.zeros((BT, BV), tl.float32)
            pairs = tl.zeros((BT, BT), tl.float32)
            w = n % heads * features if PER_HEAD else 0
            state = (local * chunks + chunk) * features
            scales = (local * (chunks + 1) + chunk) * features
            for f0 in range(0, features, BM):
                f = f0 + tl.arange(0, BM)
                at = (w + f)[:, None] * BD + tl.arange(0, BD)[None, :]
                hi = tl.load(HI + at)
                bias = tl.load(BIAS + w + f)
                past = tl.load(SCALE + scales + f)
                zk = project_chunk(
                    k, K, step, sks, taking, hi, HI, LO, w + f, D, BD, PRECISION, SPLIT
                )
                ek = on_grid(logarithms(zk, bias[None, :], -norm[:, None], FORM, EPSILON), SPLIT)
                ek = tl.where((norm < LARGEST_NORM)[:, None], ek, -INFINITY)
                scale = tl.maximum(past, tl.ceil(tl.max(ek, 0)))
                phi_k = (tl.exp2(ek - scale[None, :]) + poison(norm)[:, None]).to(OPERAND)
                zq = project_chunk(
                    q, Q, step, sql, inside, hi, HI, LO, w + f, D, BD, PRECISION, SPLIT
                )
                eq = on_grid(logarithms(zq, bias[None, :], 0.0, FORM, EPSILON), SPLIT)
                new = tl.maximum(peak, tl.ceil(tl.max(eq + scale[None, :], 1)))
                decay = tl.exp2(peak - new)
                # Integers first. Without keys both are LOWEST.
                phi_q = tl.exp2(tl.minimum(eq - (new[:, None] - scale[None, :]), 1.0)).to(OPERAND)
                pairs = dot(phi_q, tl.trans(phi_k), pairs * decay[:, None], PRECISION)
                share = tl.exp2(past - scale)
                kv = load_sums(KV + state * DV, f, DV, BV) * share[:, None]
                acc = times_sums(phi_q, kv, acc * decay[:, None], PRECISION)
                ks = tl.load(KS + state + f) * share
                den = den * decay + tl.sum(phi_q.to(tl.float32) * ks[None, :], 1)
                peak = new
            own = tl.load(SEG + i + step, mask=inside, other=-2) if HAS_SEG else r
            continues = own == previous_segment(SEG, start, length, HAS_SEG, REVERSE)
            if HAS_SEG:
                # Sums of another sequence are not seen, whatever they hold.
                acc = tl.where(continues[:, None], acc, 0.0)
                den = tl.where(continues, den, 0.0)
            seen = seen_pairs(r, r, own, own, STRICT, HAS_SEG)
            pairs = tl.where(seen, pairs, 0.0).to(OPERAND)
            v = load_rows(V + head_of(n, heads, svb, svh) + j * svs, step, svs, taking, DV, BV)
            acc = dot(pairs, v.to(OPERAND), acc, PRECISION)
            den += tl.sum(pairs.to(tl.float32), 1)
            has_past = tl.load(SCALE + scales + r * 0) > LOWEST
            if FORM != "exponential":
                # A feature that is zero has no scale to tell of keys.
                has_past = r >= 0
            known = tl.max((seen & (norm < LARGEST_NORM)[None, :]).to(tl.int32), 1) > 0
            if HAS_SEG:
                known = known | (continues & has_past)
            else:
                known = known | has_past
            if MERGE:
                part_log = tl.load(PART_LOG + row + step, mask=inside, other=-INFINITY)
                part = head_of(n, heads, spb, sph) + (g * spg + i * spl)
                part_out = load_rows(PART_OUT + part, step, spl, inside, DV, BV)
                known = known | (part_log > -INFINITY)
                new = tl.maximum(peak, tl.ceil(part_log))
                decay = tl.exp2(peak - new)
                more = tl.exp2(part_log - new)
                acc = acc * decay[:, None] + part_out * more[:, None]
                den = den * decay + more
                peak = new
            rows = inside & ((again == 0) | (r == t))
            unsure = known & (den < SMALLEST)
            acc, log = finished(acc, den, peak, broken)
            to = OUT + head_of(n, heads, sob, soh) + (g * sog + i * sol)
            store_rows(to, step, sol, acc, rows, DV, BV)
            tl.store(LOG + row + step, log, mask=rows)
            marks = tl.where(again > 0, 1, 0) + unsure.to(tl.int32)
            tl.store(LOST + row + step, marks.to(tl.uint8), mask=rows)


@triton.jit(do_not_specialize=["first", "length", "delay", "chunks", "features"])
def chunk_query_gradients(
    Q, K, V, NORM, SEG, GRAD_OUT, DELTA, LOG, LOST, HI, LO, BIAS, KV, KS, SCALE, GRAD_Q,
    sqb, sqh, sqg, sql, skb, skh, sks, svb, svh, svs, sgb, sgh, sgg, sgl, sxb, sxh, sxg, sxl,
    heads, groups, first, length, delay, chunks, features, pull,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    STRICT: tl.constexpr, ADD: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries of one chunk, zero for lost rows."""
    g = (tl.program_id(0) % groups).to(tl.int64)
    chunk = tl.program_id(0) // groups % chunks
    local = (tl.program_id(0) // groups // chunks).to(tl.int64)
    n = first + local
    start = chunk * BT
    r = tl.arange(0, BT)
    step = steps(BT, REVERSE)
    inside = start + r < length
    i = place_of(start, length, REVERSE)
    j = key_place(start, length, delay, REVERSE)
    Q += head_of(n, heads, sqb, sqh) + (g * sqg + i * sql)
    q = load_rows(Q, step, sql, inside, D, BD)
    norm = tl.load(NORM + (n * length + start) + r, mask=inside, other=INFINITY)
    taking = norm < INFINITY
    K += head_of(n, heads, skb, skh) + j * sks
    k = load_rows(K, step, sks, taking, D, BD)
    v = load_rows(V + head_of(n, heads, svb, svh) + j * svs, step, svs, taking, DV, BV)
    to = GRAD_OUT + head_of(n, heads, sgb, sgh) + (g * sgg + i * sgl)
    grad = load_rows(to, step, sgl, inside, DV, BV).to(OPERAND)
    row = (n * groups + g) * length + i
    lost = tl.load(LOST + row + step, mask=inside, other=1) != 0
    log = tl.where(lost, INFINITY, tl.load(LOG + row + step, mask=inside, other=INFINITY))
    delta = tl.load(DELTA + row + step, mask=inside, other=0.0)
    own = tl.load(SEG + i + step, mask=inside, other=-2) if HAS_SEG else r
    continues = own == previous_segment(SEG, start, length, HAS_SEG, REVERSE)
    seen = seen_pairs(r, r, own, own, STRICT, HAS_SEG)
    slope = dot(grad, tl.trans(v.to(OPERAND)), tl.zeros((BT, BT), tl.float32), PRECISION)
    slope = tl.where(seen, slope - delta[:, None], 0.0).to(OPERAND)
    dq = tl.zeros((BT, BD), tl.float32)
    along = tl.zeros((BT,), tl.float32)
    w = n % heads * features if PER_HEAD else 0
    state = (local * chunks + chunk) * features
    scales = (local * (chunks + 1) + chunk) * features
    for f0 in range(0, features, BM):
        f = f0 + tl.arange(0, BM)
        at = (w + f)[:, None] * BD + tl.arange(0, BD)[None, :]
        hi = tl.load(HI + at)
        bias = tl.load(BIAS + w + f)
        past = tl.load(SCALE + scales + f)
        zk = project_chunk(k, K, step, sks, taking, hi, HI, LO, w + f, D, BD, PRECISION, SPLIT)
        ek = logarithms(zk, bias[None, :], -norm[:, None], FORM, EPSILON)
        ek = tl.where((norm < LARGEST_NORM)[:, None], ek, -INFINITY)
        scale = tl.maximum(past, tl.ceil(tl.max(ek, 0)))
        phi_k = tl.exp2(ek - scale[None, :]).to(OPERAND)
        zq = project_chunk(q, Q, step, sql, inside, hi, HI, LO, w + f, D, BD, PRECISION, SPLIT)
        eq = logarithms(zq, bias[None, :], scale[None, :], FORM, EPSILON)
        phi_q = tl.exp2(eq - log[:, None])
        kv = load_sums(KV + state * DV, f, DV, BV).to(OPERAND)
        far = -delta[:, None] * tl.load(KS + state + f)[None, :]
        far = dot(grad, tl.trans(kv), far, PRECISION) * tl.exp2(past - scale)[None, :]
        if HAS_SEG:
            far = tl.where(continues[:, None], far, 0.0)
        h = dot(slope, phi_k, far, PRECISION) * phi_q
        h = times_slope(h, zq, bias[None, :], FORM, EPSILON)
        dq = dot(h.to(OPERAND), hi.to(OPERAND), dq, PRECISION)
        along += tl.sum(h, 1)
    # Read again when all is done, so as not to be kept until then.
    read = inside & (along == along)
    q = load_rows(Q, step, sql, read, D, BD)
    dq = dq * LN2 - q.to(tl.float32) * (along * pull)[:, None]
    GRAD_Q += head_of(n, heads, sxb, sxh) + (g * sxg + i * sxl)
    if ADD:
        dq += load_rows(GRAD_Q, step, sxl, inside, D, BD)
    store_rows(GRAD_Q, step, sxl, dq, inside, D, BD)


@triton.jit(do_not_specialize=["first", "length", "delay", "chunks", "features"])
def chunk_key_gradients(
    Q, K, V, NORM, SEG, GRAD_OUT, DELTA, LOG, LOST, HI, LO, BIAS, GRAD_KV, GRAD_KS, SCALE,
    GRAD_K, GRAD_V,
    sqb, sqh, sqg, sql, skb, skh, sks, svb, svh, svs, sgb, sgh, sgg, sgl,
    sxb, sxh, sxs, syb, syh, sys,
    heads, groups, first, length, delay, chunks, features, pull,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    STRICT: tl.constexpr, ADD: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BK`` keys and values of a chunk: by later chunks, and by rows not lost."""
    tiles: tl.constexpr = BT // BK
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles % chunks
    local = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    n = first + local
    start = chunk * BT
    r = tl.arange(0, BT)
    step = steps(BT, REVERSE)
    inside = start + r < length
    i = place_of(start, length, REVERSE)
    j = key_place(start, length, delay, REVERSE)
    t = tile * BK + tl.arange(0, BK)
    key_step = -t if REVERSE else t
    there = start + t < length
    norm = tl.load(NORM + (n * length + start) + t, mask=there, other=INFINITY)
    taking = norm < INFINITY
    featured = norm < LARGEST_NORM
    K += head_of(n, heads, skb, skh) + j * sks
    k = load_rows(K, key_step, sks, featured, D, BD)
    v = load_rows(V + head_of(n, heads, svb, svh) + j * svs, key_step, svs, taking, DV, BV).to(
        OPERAND
    )
    own = tl.load(SEG + i + step, mask=inside, other=-2) if HAS_SEG else r
    own_key = tl.load(SEG + i + key_step, mask=there, other=-3) if HAS_SEG else t
    going_on = featured
    if HAS_SEG:
        last = tl.load(SEG + place_of(tl.minimum(start + BT, length) - 1, length, REVERSE))
        going_on = going_on & (own_key == last)
    seen = t[:, None] < r[None, :] if STRICT else t[:, None] <= r[None, :]
    if HAS_SEG:
        seen = seen & (own_key[:, None] == own[None, :])
    Q += head_of(n, heads, sqb, sqh) + i * sql
    GRAD_OUT += head_of(n, heads, sgb, sgh) + i * sgl
    dk = tl.zeros((BK, BD), tl.float32)
    dv = tl.zeros((BK, BV), tl.float32)
    along = tl.zeros((BK,), tl.float32)
    w = n % heads * features if PER_HEAD else 0
    state = (local * chunks + chunk) * features
    scales = (local * (chunks + 1) + chunk) * features
    for f0 in range(0, features, BM):
        f = f0 + tl.arange(0, BM)
        at = (w + f)[:, None] * BD + tl.arange(0, BD)[None, :]
        hi = tl.load(HI + at)
        bias, after = tl.load(BIAS + w + f), tl.load(SCALE + scales + features + f)
        z = project_chunk(k, K, key_step, sks, featured, hi, HI, LO, w + f, D, BD, PRECISION, SPLIT)
        e = logarithms(z, bias[None, :], -after[None, :], FORM, EPSILON) - norm[:, None]
        phi = tl.exp2(tl.where(going_on[:, None], e, -INFINITY))
        dkv = load_sums(GRAD_KV + state * DV, f, DV, BV).to(OPERAND)
        slope = tl.zeros((BK, BM), tl.float32) + tl.load(GRAD_KS + state + f)[None, :]
        h = dot(v, tl.trans(dkv), slope, PRECISION) * phi
        h = times_slope(h, z, bias[None, :], FORM, EPSILON)
        dv = dot(phi.to(OPERAND), dkv, dv, PRECISION)
        dk = dot(h.to(OPERAND), hi.to(OPERAND), dk, PRECISION)
        along += tl.sum(h, 1)
    for g in range(0, groups):
        q = load_rows(Q + g * sqg, step, sql, inside, D, BD)
        grad = load_rows(GRAD_OUT + g * sgg, step, sgl, inside, DV, BV).to(OPERAND)
        row = (n * groups + g) * length + i
        lost = tl.load(LOST + row + step, mask=inside, other=1) != 0
        log = tl.where(lost, INFINITY, tl.load(LOG + row + step, mask=inside, other=INFINITY))
        delta = tl.load(DELTA + row + step, mask=inside, other=0.0)
        slope = dot(v, tl.trans(grad), tl.zeros((BK, BT), tl.float32), PRECISION)
        slope = tl.where(seen, slope - delta[None, :], 0.0).to(OPERAND)
        pairs = tl.zeros((BK, BT), tl.float32)
        for f0 in range(0, features, BM):
            f = f0 + tl.arange(0, BM)
            at = (w + f)[:, None] * BD + tl.arange(0, BD)[None, :]
            hi = tl.load(HI + at)
            bias = tl.load(BIAS + w + f)
            past = tl.load(SCALE + scales + f)
            zk = project_chunk(
                k, K, key_step, sks, featured, hi, HI, LO, w + f, D, BD, PRECISION, SPLIT
            )
            ek = logarithms(zk, bias[None, :], -norm[:, None], FORM, EPSILON)
            ek = tl.where(featured[:, None], ek, -INFINITY)
            scale = tl.maximum(past, tl.ceil(tl.max(ek, 0)))
            phi_k = tl.exp2(ek - scale[None, :])
            zq = project_chunk(
                q, Q + g * sqg, step, sql, inside, hi, HI, LO, w + f, D, BD, PRECISION, SPLIT
            )
            eq = logarithms(zq, bias[None, :], scale[None, :], FORM, EPSILON)
            phi_q = tl.exp2(eq - log[:, None]).to(OPERAND)
            pairs = dot(phi_k.to(OPERAND), tl.trans(phi_q), pairs, PRECISION)
            h = dot(slope, phi_q, tl.zeros((BK, BM), tl.float32), PRECISION) * phi_k
            h = times_slope(h, zk, bias[None, :], FORM, EPSILON)
            dk = dot(h.to(OPERAND), hi.to(OPERAND), dk, PRECISION)
            along += tl.sum(h, 1)
        pairs = tl.where(seen, pairs, 0.0).to(OPERAND)
        dv = dot(pairs, grad, dv, PRECISION)
    read = featured & (along == along)
    k = load_rows(K, key_step, sks, read, D, BD)
    dk = dk * LN2 - k.to(tl.float32) * (along * pull)[:, None]
    GRAD_K += head_of(n, heads, sxb, sxh) + j * sxs
    GRAD_V += head_of(n, heads, syb, syh) + j * sys
    if ADD:
        dk += load_rows(GRAD_K, key_step, sxs, there & taking, D, BD)
        dv += load_rows(GRAD_V, key_step, sys, there & taking, DV, BV)
        there = there & taking
    store_rows(GRAD_K, key_step, sxs, dk, there, D, BD)
    store_rows(GRAD_V, key_step, sys, dv, there, DV, BV)
