"""Sums over the keys, feature by feature, and their gradients: sums over the rows of queries.

Sums are ``key_value_f = sum_j 2^(e_jf - s_f) v_j`` and ``key_sum_f``, the same without ``v_j``, at
the integer scale ``s_f`` of the largest exponent. The keys of a head are cut into splits, for there
may be fewer heads than a GPU has processors, and the sums of splits are combined in order. Causal
calls want the sums before each chunk too: ``STATES``.

Row logarithms ``LOG`` in backward kernels are plus infinity for a row without keys, which then has
no weight: ``a_if = 2^(e_if + s_f - log_i)``.
"""

import triton
import triton.language as tl

from performers.attention.triton.kernels.forms import key_exponents, logarithms
from performers.attention.triton.kernels.parts import (
    INFINITY,
    LOWEST,
    dot,
    head_of,
    is_broken,
    key_place,
    load_columns,
    load_rows,
    load_sums,
    place_of,
    poison,
    previous_segment,
    project_columns,
    steps,
    store_sums,
)


@triton.jit(do_not_specialize=["slots", "keys", "delay"])
def key_norms(
    K, V, MASK, SEG, NORM,
    skb, skh, sks, svb, svh, svs, heads, slots, keys, delay, factor,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """``factor |k|^2`` of the key of each slot; a factor of zero is for features without a norm.

    Infinite where there is no key that takes part, NaN where key or value hold NaN or infinity.
    """
    blocks = tl.cdiv(slots, BT)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * BT + tl.arange(0, BT)
    j = key_place(slot, slots, delay, REVERSE)
    keep = (slot < slots) & (j >= 0) & (j < keys)
    if HAS_MASK:
        keep = keep & (tl.load(MASK + n // heads * keys + j, mask=keep, other=0) != 0)
    if HAS_SEG:
        own = tl.load(SEG + place_of(slot, slots, REVERSE), mask=slot < slots, other=-1)
        keep = keep & (tl.load(SEG + j, mask=keep, other=-2) == own)
    k = load_rows(K + head_of(n, heads, skb, skh), j, sks, keep, D, BD)
    v = load_rows(V + head_of(n, heads, svb, svh), j, svs, keep, DV, BV)
    k = k.to(tl.float32)
    square = tl.sum(k * k, 1)
    norm = tl.where(square < 3e38, square * factor, tl.where(factor > 0.0, 3e38, 0.0))
    norm = tl.where(keep, norm, INFINITY)
    norm = tl.where(is_broken(k) | is_broken(v), float("nan"), norm)
    tl.store(NORM + n * slots + slot, norm, mask=slot < slots)


@triton.jit(do_not_specialize=["first", "slots", "delay", "span", "splits", "chunks", "features"])
def key_sums(
    K, V, NORM, SEG, HI, LO, BIAS, START_KV, START_KS, START_SCALE,
    KV, KS, SCALE, LAST_KV, LAST_KS, LAST_SCALE,
    skb, skh, sks, svb, svh, svs,
    heads, first, slots, delay, span, splits, chunks, features,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    HAS_START: tl.constexpr, STATES: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Sums over the keys of one split, from those before it if there are any."""
    blocks = features // BM
    f = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    split = tl.program_id(0) // blocks % splits
    local = (tl.program_id(0) // blocks // splits).to(tl.int64)
    n = first + local
    w = n % heads * features if PER_HEAD else 0
    at = (w + f)[:, None] * BD + tl.arange(0, BD)[None, :]
    hi = tl.load(HI + at)
    bias = tl.load(BIAS + w + f)
    K += head_of(n, heads, skb, skh)
    V += head_of(n, heads, svb, svh)
    end = (local * splits + split) * features
    acc = tl.zeros((BM, BV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    scale = tl.full((BM,), LOWEST, tl.float32)
    if HAS_START:
        acc = load_sums(START_KV + end * DV, f, DV, BV)
        total = tl.load(START_KS + end + f)
        scale = tl.load(START_SCALE + end + f)
    begin = split * span
    stop = tl.minimum(slots, begin + span)
    state = (local * chunks + begin // BT) * features
    scales = (local * (chunks + 1) + begin // BT) * features
    step = steps(BT, REVERSE)
    for start in range(begin, stop, BT):
        if STATES:
            store_sums(KV + state * DV, f, acc, DV, BV)
            tl.store(KS + state + f, total)
            tl.store(SCALE + scales + f, scale)
        inside = start + tl.arange(0, BT) < stop
        norm = tl.load(NORM + (n * slots + start) + tl.arange(0, BT), mask=inside, other=INFINITY)
        if HAS_SEG:
            # Only the last sequence of a chunk goes on.
            own = tl.load(SEG + place_of(start, slots, REVERSE) + step, mask=inside, other=-1)
            last = tl.load(SEG + place_of(tl.minimum(start + BT, stop) - 1, slots, REVERSE))
            norm = tl.where(own == last, norm, INFINITY)
            before = previous_segment(SEG, start, slots, HAS_SEG, REVERSE)
            same = tl.zeros((BM,), tl.int32) + before == last
            acc = tl.where(same[:, None], acc, 0.0)
            total = tl.where(same, total, 0.0)
            scale = tl.where(same, scale, LOWEST)
        taking = norm < INFINITY
        j = key_place(start, slots, delay, REVERSE)
        xt = load_columns(K + j * sks, step, sks, taking, D, BD)
        v = load_rows(V + j * svs, step, svs, taking, DV, BV).to(OPERAND)
        z = project_columns(hi, LO, at, xt, PRECISION, SPLIT)
        e = key_exponents(z, bias, norm, FORM, EPSILON)
        new = tl.maximum(scale, tl.ceil(tl.max(e, 1)))
        decay = tl.exp2(scale - new)
        phi = (tl.exp2(e - new[:, None]) + poison(norm)[None, :]).to(OPERAND)
        acc = dot(phi, v, acc * decay[:, None], PRECISION)
        total = total * decay + tl.sum(phi.to(tl.float32), 1)
        scale = new
        state += features
        scales += features
    store_sums(LAST_KV + end * DV, f, acc, DV, BV)
    tl.store(LAST_KS + end + f, total)
    tl.store(LAST_SCALE + end + f, scale)
    if STATES:
        if split == splits - 1:
            tl.store(SCALE + scales + f, scale)


@triton.jit(do_not_specialize=["slots", "span", "splits", "features"])
def combine(
    KV, KS, SCALE, START_KV, START_KS, START_SCALE, LAST_KV, LAST_KS, LAST_SCALE, SEG,
    slots, span, splits, features,
    DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    HAS_START: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn sums of each split into those over all splits before it; ``LAST`` is the total."""
    blocks = features // BM
    f = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    end = n * features
    acc = tl.zeros((BM, BV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    scale = tl.full((BM,), LOWEST, tl.float32)
    if HAS_START:
        acc = load_sums(START_KV + end * DV, f, DV, BV)
        total = tl.load(START_KS + end + f)
        scale = tl.load(START_SCALE + end + f)
    at = n * splits * features
    begin = splits * 0
    for _ in range(0, splits):
        more = load_sums(KV + at * DV, f, DV, BV)
        more_total = tl.load(KS + at + f)
        more_scale = tl.load(SCALE + at + f)
        store_sums(KV + at * DV, f, acc, DV, BV)
        tl.store(KS + at + f, total)
        tl.store(SCALE + at + f, scale)
        if HAS_SEG:
            before = previous_segment(SEG, begin, slots, HAS_SEG, REVERSE)
            last = tl.load(SEG + place_of(tl.minimum(begin + span, slots) - 1, slots, REVERSE))
            same = tl.zeros((BM,), tl.int32) + before == last
            acc = tl.where(same[:, None], acc, 0.0)
            total = tl.where(same, total, 0.0)
            scale = tl.where(same, scale, LOWEST)
        new = tl.maximum(scale, more_scale)
        decay = tl.exp2(scale - new)
        growth = tl.exp2(more_scale - new)
        acc = acc * decay[:, None] + more * growth[:, None]
        total = total * decay + more_total * growth
        scale = new
        at += features
        begin += span
    store_sums(LAST_KV + end * DV, f, acc, DV, BV)
    tl.store(LAST_KS + end + f, total)
    tl.store(LAST_SCALE + end + f, scale)


@triton.jit(do_not_specialize=["length", "log_normalizer"])
def row_terms(
    Q, OUT, GRAD_OUT, LOG, DELTA, READY, FEATURE_READY,
    sqb, sqh, sqg, sql, sob, soh, sog, sol, sgb, sgh, sgg, sgl,
    heads, groups, length, norm, log_normalizer,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """``delta = grad_out . out`` of each row, and its logarithm as the backward kernels read it.

    With ``EXACT`` pairs, features read it without the factor ``normalizer 2^(-norm |q|^2)``.
    """
    blocks = tl.cdiv(length, BT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BT + tl.arange(0, BT)
    inside = i < length
    i = i.to(tl.int64)
    n, g = row // groups, row % groups
    out = load_rows(OUT + head_of(n, heads, sob, soh) + g * sog, i, sol, inside, DV, BV)
    grad = load_rows(GRAD_OUT + head_of(n, heads, sgb, sgh) + g * sgg, i, sgl, inside, DV, BV)
    log = tl.load(LOG + row * length + i, mask=inside, other=-INFINITY)
    log = tl.where(log == -INFINITY, INFINITY, log)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(DELTA + row * length + i, delta, mask=inside)
    tl.store(READY + row * length + i, log, mask=inside)
    if EXACT:
        q = load_rows(Q + head_of(n, heads, sqb, sqh) + g * sqg, i, sql, inside, D, BD)
        q = q.to(tl.float32)
        log += tl.sum(q * q, 1) * norm - log_normalizer
        tl.store(FEATURE_READY + row * length + i, log, mask=inside)


@triton.jit(do_not_specialize=["first", "length", "span", "splits", "chunks", "features"])
def query_sums(
    Q, GRAD_OUT, DELTA, LOG, SEG, HI, LO, BIAS, SCALE, START_KV, START_KS,
    GRAD_KV, GRAD_KS, LAST_KV, LAST_KS,
    sqb, sqh, sqg, sql, sgb, sgh, sgg, sgl,
    heads, groups, first, length, span, splits, chunks, features,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, PER_HEAD: tl.constexpr,
    HAS_START: tl.constexpr, CAUSAL: tl.constexpr, STATES: tl.constexpr,
    HAS_SEG: tl.constexpr, REVERSE: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    FORM: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums by the rows of one split: ``sum_i a_if (grad_out_i, -delta_i)``.

    ``CAUSAL`` rows read the sums before their chunk. With ``STATES``, gradients of the sums after
    each chunk are stored, from the last one backwards.
    """
    blocks = features // BM
    f = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    split = tl.program_id(0) // blocks % splits
    local = (tl.program_id(0) // blocks // splits).to(tl.int64)
    n = first + local
    w = n % heads * features if PER_HEAD else 0
    at = (w + f)[:, None] * BD + tl.arange(0, BD)[None, :]
    hi = tl.load(HI + at)
    bias = tl.load(BIAS + w + f)
    Q += head_of(n, heads, sqb, sqh)
    GRAD_OUT += head_of(n, heads, sgb, sgh)
    end = (local * splits + split) * features
    acc = tl.zeros((BM, BV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if HAS_START:
        acc = load_sums(START_KV + end * DV, f, DV, BV)
        total = tl.load(START_KS + end + f)
    begin = split * span
    stop = tl.minimum(length, begin + span)
    count = tl.cdiv(stop - begin, BT)
    start = begin + (count - 1) * BT
    step = steps(BT, REVERSE)
    if CAUSAL:
        state = (local * chunks + start // BT) * features
        scales = (local * (chunks + 1) + start // BT) * features
        after = tl.load(SCALE + scales + features + f)
    else:
        before = tl.load(SCALE + local * features + f)
    for _ in range(0, count):
        inside = start + tl.arange(0, BT) < stop
        continues = inside
        i = place_of(start, length, REVERSE)
        if STATES:
            store_sums(GRAD_KV + state * DV, f, acc, DV, BV)
            tl.store(GRAD_KS + state + f, total)
        if CAUSAL:
            before = tl.load(SCALE + scales + f)
            factor = tl.exp2(before - after)
            if HAS_SEG:
                past = previous_segment(SEG, start, length, HAS_SEG, REVERSE)
                last = tl.load(SEG + place_of(tl.minimum(start + BT, stop) - 1, length, REVERSE))
                factor = tl.where(tl.zeros((BM,), tl.int32) + past == last, factor, 0.0)
                own = tl.load(SEG + i + step, mask=inside, other=-2)
                continues = own == past
            acc = acc * factor[:, None]
            total = total * factor
            after = before
            state -= features
            scales -= features
        row = n * groups * length + i
        for g in range(0, groups):
            xt = load_columns(Q + (g * sqg + i * sql), step, sql, inside, D, BD)
            grad = load_rows(GRAD_OUT + (g * sgg + i * sgl), step, sgl, continues, DV, BV).to(
                OPERAND
            )
            log = tl.load(LOG + row + step, mask=inside, other=INFINITY)
            delta = tl.load(DELTA + row + step, mask=continues, other=0.0)
            z = project_columns(hi, LO, at, xt, PRECISION, SPLIT)
            e = logarithms(z, bias[:, None], before[:, None], FORM, EPSILON)
            a = tl.exp2(e - log[None, :])
            if HAS_SEG:
                # Rather than where queries are loaded, which takes more registers than there are.
                a = tl.where(continues[None, :], a, 0.0)
            acc = dot(a.to(OPERAND), grad, acc, PRECISION)
            total -= tl.sum(a * delta[None, :], 1)
            row += length
        start -= BT
    store_sums(LAST_KV + end * DV, f, acc, DV, BV)
    tl.store(LAST_KS + end + f, total)


@triton.jit(do_not_specialize=["slots", "span", "splits", "chunks", "features"])
def combine_gradients(
    KV, KS, SCALE, START_KV, START_KS, SEG,
    slots, span, splits, chunks, features,
    DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    HAS_START: tl.constexpr, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn gradients by the rows of each split into those by all splits after it."""
    blocks = features // BM
    f = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    end = n * features
    acc = tl.zeros((BM, BV), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if HAS_START:
        acc = load_sums(START_KV + end * DV, f, DV, BV)
        total = tl.load(START_KS + end + f)
    scales = n * (chunks + 1) * features
    after = tl.load(SCALE + scales + chunks * features + f)
    begin = (splits - 1) * span
    at = (n * splits + splits - 1) * features
    for _ in range(0, splits):
        more = load_sums(KV + at * DV, f, DV, BV)
        more_total = tl.load(KS + at + f)
        store_sums(KV + at * DV, f, acc, DV, BV)
        tl.store(KS + at + f, total)
        before = tl.load(SCALE + scales + begin // BT * features + f)
        factor = tl.exp2(before - after)
        if HAS_SEG:
            past = previous_segment(SEG, begin, slots, HAS_SEG, REVERSE)
            last = tl.load(SEG + place_of(tl.minimum(begin + span, slots) - 1, slots, REVERSE))
            factor = tl.where(tl.zeros((BM,), tl.int32) + past == last, factor, 0.0)
        acc = acc * factor[:, None] + more
        total = total * factor + more_total
        after = before
        at -= features
        begin -= span
