"""Exact pairs: keys within the window and sinks, under one normaliser with the features.

The online softmax of a row begins at what it saw through features, so joining the two parts costs
nothing. Query ``i`` stands at key ``i + offset``. Logarithms are those of ``exp(scale q . k)``, to
which the features' lack ``normalizer e^(-scale |q|^2 / 2)``.
"""

import triton
import triton.language as tl

from performers.attention.triton.kernels.parts import (
    INFINITY,
    LOWEST,
    dot,
    finished,
    head_of,
    is_broken,
    load_rows,
    poison,
    store_rows,
)


@triton.jit
def window_pairs(i, j, offset, window, norm, own, SEG, CAUSAL: tl.constexpr, HAS_SEG: tl.constexpr):
    """Mask of the keys that each query meets exactly."""
    distance = j[None, :] - (i[:, None] + offset)
    seen = (distance >= -window) & ((norm < INFINITY) | (norm != norm))[None, :]
    if CAUSAL:
        seen = seen & (distance <= 0)
    else:
        seen = seen & (distance <= window)
    if HAS_SEG:
        other = tl.load(SEG + j, mask=norm != INFINITY, other=-3)
        seen = seen & (own[:, None] == other[None, :])
    return seen


@triton.jit
def load_sinks(
    SINK_K, SINK_V, FIRST, sequence, h, s, sinks, skb, skh, sks, svb, svh, svs,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Some sinks of a sequence, the first query that sees each, NaN for those that hold some."""
    there = s < sinks
    sequence = tl.cast(sequence, tl.int64)
    k = load_rows(SINK_K + (sequence * skb + h * skh), s, sks, there, D, BD)
    v = load_rows(SINK_V + (sequence * svb + h * svh), s, svs, there, DV, BV)
    broken = is_broken(k) | is_broken(v)
    k = tl.where(broken[:, None], 0.0, k).to(k.dtype)
    v = tl.where(broken[:, None], 0.0, v).to(v.dtype)
    first = tl.load(FIRST + sequence * sinks + s, mask=there, other=1 << 62)
    return k, v, first, tl.where(broken, float("nan"), 0.0)


@triton.jit
def add_pairs(
    q, k, v, seen, bad, peak, den, acc, scale, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """One more block of keys for the rows' sums."""
    e = dot(q, tl.trans(k), tl.zeros(seen.shape, tl.float32), PRECISION) * scale
    e = tl.where(seen, e, -INFINITY)
    new = tl.maximum(peak, tl.ceil(tl.max(e, 1)))
    decay = tl.exp2(peak - new)
    p = (tl.exp2(e - new[:, None]) + tl.where(seen, bad[None, :], 0.0)).to(OPERAND)
    acc = dot(p, v.to(OPERAND), acc * decay[:, None], PRECISION)
    return new, den * decay + tl.sum(p.to(tl.float32), 1), acc


@triton.jit(do_not_specialize=["length", "size", "offset", "window", "sinks", "log_normalizer"])
def exact_rows(
    Q, K, V, NORM, SEG, SINK_K, SINK_V, FIRST, PART_OUT, PART_LOG, OUT, LOG,
    sqb, sqh, sqg, sql, skb, skh, sks, svb, svh, svs, spb, sph, spg, spl, sob, soh, sog, sol,
    stb, sth, sts, sub, suh, sus,
    heads, groups, length, size, offset, window, sinks, scale, norm, log_normalizer,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    BS: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SEG: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output rows and logarithms, from those of the features ``PART_OUT``, ``PART_LOG``."""
    blocks = tl.cdiv(length, BT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BT
    r = tl.arange(0, BT)
    i = start + r
    inside = i < length
    n, g = row // groups, row % groups
    base = tl.cast(start, tl.int64)
    q = load_rows(Q + head_of(n, heads, sqb, sqh) + (g * sqg + base * sql), r, sql, inside, D, BD)
    log = tl.load(PART_LOG + (row * length + base) + r, mask=inside, other=-INFINITY)
    squares = q.to(tl.float32)
    log += log_normalizer - tl.sum(squares * squares, 1) * norm
    peak = tl.maximum(tl.ceil(log), LOWEST)
    den = tl.exp2(log - peak)
    part = PART_OUT + head_of(n, heads, spb, sph) + (g * spg + base * spl)
    acc = load_rows(part, r, spl, inside, DV, BV) * den[:, None]
    own = tl.load(SEG + i, mask=inside, other=-2) if HAS_SEG else i
    if HAS_WINDOW:
        K += head_of(n, heads, skb, skh)
        V += head_of(n, heads, svb, svh)
        begin = tl.maximum(start + offset - window, 0) // BS * BS
        stop = start + BT + offset
        if not CAUSAL:
            stop += window
        stop = tl.minimum(stop, size)
        for s0 in range(begin, stop, BS):
            j = s0 + tl.arange(0, BS)
            bad = tl.load(NORM + n * size + j, mask=j < size, other=INFINITY)
            taking = bad < INFINITY
            at = tl.cast(s0, tl.int64)
            k = load_rows(K + at * sks, tl.arange(0, BS), sks, taking, D, BD)
            v = load_rows(V + at * svs, tl.arange(0, BS), svs, taking, DV, BV)
            seen = window_pairs(i, j, offset, window, bad, own, SEG, CAUSAL, HAS_SEG)
            peak, den, acc = add_pairs(
                q, k, v, seen, poison(bad), peak, den, acc, scale, OPERAND, PRECISION
            )
    if HAS_SINKS:
        h = n % heads
        first_sequence = n // heads
        last_sequence = first_sequence
        if HAS_SEG:
            first_sequence = tl.load(SEG + start)
            last_sequence = tl.load(SEG + tl.minimum(start + BT, length) - 1)
        for sequence in range(first_sequence, last_sequence + 1):
            for s0 in range(0, sinks, 16):
                k, v, first, bad = load_sinks(
                    SINK_K, SINK_V, FIRST, sequence, h, s0 + tl.arange(0, 16), sinks,
                    stb, sth, sts, sub, suh, sus, D, DV, BD, BV,
                )  # fmt: skip
                seen = i[:, None] >= first[None, :]
                if HAS_SEG:
                    seen = seen & (own == sequence)[:, None]
                peak, den, acc = add_pairs(
                    q, k, v, seen, bad, peak, den, acc, scale, OPERAND, PRECISION
                )
    acc, log = finished(acc, den, peak, is_broken(q))
    to = OUT + head_of(n, heads, sob, soh) + (g * sog + base * sol)
    store_rows(to, r, sol, acc, inside, DV, BV)
    tl.store(LOG + (row * length + base) + r, log, mask=inside)


@triton.jit(do_not_specialize=["length", "size", "offset", "window", "sinks"])
def exact_query_gradients(
    Q, K, V, NORM, SEG, SINK_K, SINK_V, FIRST, GRAD_OUT, DELTA, LOG, GRAD_Q,
    sqb, sqh, sqg, sql, skb, skh, sks, svb, svh, svs, sgb, sgh, sgg, sgl, sxb, sxh, sxg, sxl,
    stb, sth, sts, sub, suh, sus,
    heads, groups, length, size, offset, window, sinks, scale, factor,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    BS: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SEG: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``factor sum_j p_ij (grad_out_i . v_j - delta_i) k_j`` over the exact pairs."""
    blocks = tl.cdiv(length, BT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BT
    r = tl.arange(0, BT)
    i = start + r
    inside = i < length
    n, g = row // groups, row % groups
    base = tl.cast(start, tl.int64)
    q = load_rows(Q + head_of(n, heads, sqb, sqh) + (g * sqg + base * sql), r, sql, inside, D, BD)
    to = GRAD_OUT + head_of(n, heads, sgb, sgh) + (g * sgg + base * sgl)
    grad = load_rows(to, r, sgl, inside, DV, BV).to(OPERAND)
    log = tl.load(LOG + (row * length + base) + r, mask=inside, other=INFINITY)
    delta = tl.load(DELTA + (row * length + base) + r, mask=inside, other=0.0)
    own = tl.load(SEG + i, mask=inside, other=-2) if HAS_SEG else i
    dq = tl.zeros((BT, BD), tl.float32)
    if HAS_WINDOW:
        K += head_of(n, heads, skb, skh)
        V += head_of(n, heads, svb, svh)
        begin = tl.maximum(start + offset - window, 0) // BS * BS
        stop = start + BT + offset
        if not CAUSAL:
            stop += window
        stop = tl.minimum(stop, size)
        for s0 in range(begin, stop, BS):
            j = s0 + tl.arange(0, BS)
            bad = tl.load(NORM + n * size + j, mask=j < size, other=INFINITY)
            taking = bad < INFINITY
            at = tl.cast(s0, tl.int64)
            k = load_rows(K + at * sks, tl.arange(0, BS), sks, taking, D, BD)
            v = load_rows(V + at * svs, tl.arange(0, BS), svs, taking, DV, BV).to(OPERAND)
            seen = window_pairs(i, j, offset, window, bad, own, SEG, CAUSAL, HAS_SEG)
            e = dot(q, tl.trans(k), tl.zeros((BT, BS), tl.float32), PRECISION) * scale
            p = tl.where(seen, tl.exp2(e - log[:, None]), 0.0)
            h = p * (dot(grad, tl.trans(v), tl.zeros((BT, BS), tl.float32), PRECISION)
                     - delta[:, None])  # fmt: skip
            dq = dot(h.to(OPERAND), k.to(OPERAND), dq, PRECISION)
    if HAS_SINKS:
        first_sequence = n // heads
        last_sequence = first_sequence
        if HAS_SEG:
            first_sequence = tl.load(SEG + start)
            last_sequence = tl.load(SEG + tl.minimum(start + BT, length) - 1)
        for sequence in range(first_sequence, last_sequence + 1):
            for s0 in range(0, sinks, 16):
                k, v, first, bad = load_sinks(
                    SINK_K, SINK_V, FIRST, sequence, n % heads, s0 + tl.arange(0, 16), sinks,
                    stb, sth, sts, sub, suh, sus, D, DV, BD, BV,
                )  # fmt: skip
                seen = i[:, None] >= first[None, :]
                if HAS_SEG:
                    seen = seen & (own == sequence)[:, None]
                e = dot(q, tl.trans(k), tl.zeros((BT, 16), tl.float32), PRECISION) * scale
                p = tl.where(seen, tl.exp2(e - log[:, None]), 0.0)
                v = tl.trans(v.to(OPERAND))
                h = p * (dot(grad, v, tl.zeros((BT, 16), tl.float32), PRECISION) - delta[:, None])
                dq = dot(h.to(OPERAND), k.to(OPERAND), dq, PRECISION)
    to = GRAD_Q + head_of(n, heads, sxb, sxh) + (g * sxg + base * sxl)
    dq = dq * factor + load_rows(to, r, sxl, inside, D, BD)
    store_rows(to, r, sxl, dq, inside, D, BD)


@triton.jit
def key_gradients_of(
    q, k, v, grad, log, delta, seen, dk, dv, scale, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """Add what some rows give to keys and values that they meet exactly."""
    e = dot(q, tl.trans(k), tl.zeros(seen.shape, tl.float32), PRECISION) * scale
    p = tl.where(seen, tl.exp2(e - log[:, None]), 0.0)
    h = p * (dot(grad, tl.trans(v), tl.zeros(seen.shape, tl.float32), PRECISION) - delta[:, None])
    dk = dot(tl.trans(h.to(OPERAND)), q.to(OPERAND), dk, PRECISION)
    return dk, dot(tl.trans(p.to(OPERAND)), grad, dv, PRECISION)


@triton.jit(do_not_specialize=["length", "size", "offset", "window"])
def exact_key_gradients(
    Q, K, V, NORM, SEG, GRAD_OUT, DELTA, LOG, GRAD_K, GRAD_V,
    sqb, sqh, sqg, sql, skb, skh, sks, svb, svh, svs, sgb, sgh, sgg, sgl,
    sxb, sxh, sxs, syb, syh, sys,
    heads, groups, length, size, offset, window, scale, factor,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    BS: tl.constexpr, CAUSAL: tl.constexpr, HAS_SEG: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients of keys and values by the queries within the window of each."""
    blocks = tl.cdiv(size, BS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BS
    s = tl.arange(0, BS)
    r = tl.arange(0, BT)
    j = start + s
    base = tl.cast(start, tl.int64)
    norm = tl.load(NORM + (n * size + base) + s, mask=j < size, other=INFINITY)
    taking = norm < INFINITY
    k = load_rows(K + head_of(n, heads, skb, skh) + base * sks, s, sks, taking, D, BD)
    v = load_rows(V + head_of(n, heads, svb, svh) + base * svs, s, svs, taking, DV, BV)
    v = v.to(OPERAND)
    dk = tl.zeros((BS, BD), tl.float32)
    dv = tl.zeros((BS, BV), tl.float32)
    begin = start - offset
    if not CAUSAL:
        begin -= window
    begin = tl.maximum(begin, 0) // BT * BT
    stop = tl.minimum(start + BS - offset + window, length)
    for g in range(0, groups):
        to_q = Q + head_of(n, heads, sqb, sqh) + g * sqg
        to_grad = GRAD_OUT + head_of(n, heads, sgb, sgh) + g * sgg
        row = (n * groups + g) * length
        for i0 in range(begin, stop, BT):
            i = i0 + r
            inside = i < length
            at = tl.cast(i0, tl.int64)
            q = load_rows(to_q + at * sql, r, sql, inside, D, BD)
            grad = load_rows(to_grad + at * sgl, r, sgl, inside, DV, BV).to(OPERAND)
            log = tl.load(LOG + row + i, mask=inside, other=INFINITY)
            delta = tl.load(DELTA + row + i, mask=inside, other=0.0)
            own = tl.load(SEG + i, mask=inside, other=-2) if HAS_SEG else i
            seen = window_pairs(i, j, offset, window, norm, own, SEG, CAUSAL, HAS_SEG)
            dk, dv = key_gradients_of(
                q, k, v, grad, log, delta, seen, dk, dv, scale, OPERAND, PRECISION
            )
    to = GRAD_K + head_of(n, heads, sxb, sxh) + base * sxs
    dk = dk * factor + load_rows(to, s, sxs, j < size, D, BD)
    store_rows(to, s, sxs, dk, j < size, D, BD)
    to = GRAD_V + head_of(n, heads, syb, syh) + base * sys
    dv += load_rows(to, s, sys, j < size, DV, BV)
    store_rows(to, s, sys, dv, j < size, DV, BV)


@triton.jit(do_not_specialize=["length", "sequences", "sinks", "splits"])
def sink_gradients(
    Q, SEG, SINK_K, SINK_V, FIRST, BOUNDS, GRAD_OUT, DELTA, LOG, GRAD_K, GRAD_V,
    sqb, sqh, sqg, sql, sgb, sgh, sgg, sgl, stb, sth, sts, sub, suh, sus,
    heads, groups, length, sequences, sinks, splits, scale, factor,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    HAS_SEG: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of 16 sinks of one sequence and key head by one split of its rows."""
    blocks = tl.cdiv(sinks, 16)
    s = tl.program_id(0) % blocks * 16 + tl.arange(0, 16)
    split = tl.program_id(0) // blocks % splits
    rest = (tl.program_id(0) // blocks // splits).to(tl.int64)
    sequence, h = rest // heads, rest % heads
    k, v, first, _bad = load_sinks(
        SINK_K, SINK_V, FIRST, sequence, h, s, sinks, stb, sth, sts, sub, suh, sus, D, DV, BD, BV
    )
    v = v.to(OPERAND)
    begin = tl.load(BOUNDS + 2 * sequence)
    end = tl.load(BOUNDS + 2 * sequence + 1)
    span = tl.cdiv(end - begin, splits)
    begin += split * span
    end = tl.minimum(begin + span, end)
    # Packed sequences have one batch row.
    batch = sequence * 0 if HAS_SEG else sequence
    r = tl.arange(0, BT)
    dk = tl.zeros((16, BD), tl.float32)
    dv = tl.zeros((16, BV), tl.float32)
    for g in range(0, groups):
        to_q = Q + (batch * sqb + h * sqh + g * sqg)
        to_grad = GRAD_OUT + (batch * sgb + h * sgh + g * sgg)
        row = ((batch * heads + h) * groups + g) * length
        for i0 in range(begin, end, BT):
            i = i0 + r
            inside = i < end
            q = load_rows(to_q + i0 * sql, r, sql, inside, D, BD)
            grad = load_rows(to_grad + i0 * sgl, r, sgl, inside, DV, BV).to(OPERAND)
            log = tl.load(LOG + row + i, mask=inside, other=INFINITY)
            delta = tl.load(DELTA + row + i, mask=inside, other=0.0)
            seen = (i[:, None] >= first[None, :]) & inside[:, None]
            dk, dv = key_gradients_of(
                q, k, v, grad, log, delta, seen, dk, dv, scale, OPERAND, PRECISION
            )
    to = ((split * sequences + sequence) * heads + h) * sinks
    store_rows(GRAD_K + to * D, s, D, dk * factor, s < sinks, D, BD)
    store_rows(GRAD_V + to * DV, s, DV, dv, s < sinks, DV, BV)
