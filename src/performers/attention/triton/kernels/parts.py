"""Parts that the kernels share: products of blocks, tiles of rows, exponents of features.

Exponents are binary logarithms throughout: the projection arrives multiplied by
``sqrt(scale) log2(e)``, so that ``phi_f(x) = 2^e`` with ``e = W_f x + b_f - norm(x)``. The scale of
a feature or a row is an integer, the ceiling of a maximum: multiplying sums by a ratio of scales
is then exact, and a later key that raises a scale leaves the rows before it as they were, to the
last bit of a 16-bit output.

A projection has two parts, ``HI + LO``, each in the dtype of the inputs: rounding it to bfloat16
once would move the exponents of large inputs by several percent. It is padded to a multiple of
``FEATURE_BLOCK`` features, whose bias is minus infinity, and to ``BD`` columns of zeros.
"""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
# Where maxima begin: finite, so that no difference of two is NaN, and an integer.
LOWEST = tl.constexpr(-1e38)
# A key whose norm is not below this has no feature, and one whose norm is NaN makes rows NaN.
LARGEST_NORM = tl.constexpr(9e37)
# The least normaliser of a causal row that cannot have lost a key to underflow.
SMALLEST = tl.constexpr(2.0**-40)
INFINITY = tl.constexpr(float("inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32."""
    # Triton's interpreter multiplies the bit patterns of bfloat16, without a word.
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def head_of(n, heads, stride_batch, stride_head):
    """Offset of head ``n`` of ``batch * heads``."""
    return n // heads * stride_batch + n % heads * stride_head


@triton.jit
def load_rows(pointer, index, stride, keep, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows ``(len(index), PADDED)``, zeros where not kept and beyond ``WIDTH``."""
    c = tl.arange(0, PADDED)
    mask = keep[:, None]
    if WIDTH != PADDED:
        mask = mask & (c < WIDTH)[None, :]
    return tl.load(pointer + index[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def load_columns(pointer, index, stride, keep, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The same, transposed: ``(PADDED, len(index))``."""
    c = tl.arange(0, PADDED)
    mask = keep[None, :]
    if WIDTH != PADDED:
        mask = mask & (c < WIDTH)[:, None]
    return tl.load(pointer + index[None, :] * stride + c[:, None], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, index, stride, x, keep, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store what ``load_rows`` loads, in the dtype of the tensor."""
    c = tl.arange(0, PADDED)
    mask = keep[:, None]
    if WIDTH != PADDED:
        mask = mask & (c < WIDTH)[None, :]
    to = pointer + index[:, None] * stride + c[None, :]
    tl.store(to, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_sums(pointer, f, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Sums of some features ``(len(f), PADDED)``, zeros beyond ``WIDTH``."""
    c = tl.arange(0, PADDED).to(tl.int64)
    at = pointer + (f.to(tl.int64)[:, None] * WIDTH + c[None, :])
    if WIDTH == PADDED:
        return tl.load(at)
    else:
        return tl.load(at, mask=(c < WIDTH)[None, :], other=0.0)


@triton.jit
def store_sums(pointer, f, x, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store what ``load_sums`` loads."""
    c = tl.arange(0, PADDED).to(tl.int64)
    at = pointer + (f.to(tl.int64)[:, None] * WIDTH + c[None, :])
    if WIDTH == PADDED:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=(c < WIDTH)[None, :])


@triton.jit
def place_of(slot, length, REVERSE: tl.constexpr):
    """The position of a slot: slots run from either end of the sequence."""
    place = tl.cast(slot, tl.int64)
    return length - 1 - place if REVERSE else place


@triton.jit
def key_place(slot, length, delay, REVERSE: tl.constexpr):
    """The key of a slot, ``delay`` positions before the query of that slot."""
    place = place_of(slot, length, REVERSE)
    return place + delay if REVERSE else place - delay


@triton.jit
def steps(ROWS: tl.constexpr, REVERSE: tl.constexpr):
    """Positions of the slots of a block, counted from that of its first."""
    step = tl.arange(0, ROWS)
    return -step if REVERSE else step


@triton.jit
def previous_segment(SEG, start, length, HAS_SEG: tl.constexpr, REVERSE: tl.constexpr):
    """The sequence of the slot before ``start``, -1 where there is none."""
    if HAS_SEG:
        before = tl.load(SEG + place_of(tl.maximum(start, 1) - 1, length, REVERSE))
        return tl.where(start > 0, before, -1)
    else:
        return start


@triton.jit
def project_columns(hi, LO, at, xt, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """``W x`` of vectors in columns, ``(features, vectors)``; ``at`` are the places of ``hi``."""
    e = dot(hi, xt, tl.zeros((hi.shape[0], xt.shape[1]), tl.float32), PRECISION)
    if SPLIT:
        e = dot(tl.load(LO + at), xt, e, PRECISION)
    return e


@triton.jit
def project_rows(x, hi, LO, at, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """``x W^T`` of vectors in rows, ``(vectors, features)``; ``hi`` is ``(features, BD)``."""
    e = dot(x, tl.trans(hi), tl.zeros((x.shape[0], hi.shape[0]), tl.float32), PRECISION)
    if SPLIT:
        e = dot(x, tl.trans(tl.load(LO + at)), e, PRECISION)
    return e


@triton.jit
def project_chunk(
    x, X, index, stride, keep, hi, HI, LO, f,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """``x W^T`` of the rows of a chunk ``x``, which are those at ``X``.

    Float32 ones are read anew, in pieces: as operands of three products, two chunks of them would
    take all registers.
    """
    if SPLIT:
        at = f[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
        return project_rows(x, hi, LO, at, PRECISION, SPLIT)
    else:
        e = tl.zeros((x.shape[0], f.shape[0]), tl.float32)
        piece: tl.constexpr = 32 if PADDED > 32 else PADDED
        for start in range(0, PADDED, piece):
            c = start + tl.arange(0, piece)
            mask = keep[:, None] & (c < WIDTH)[None, :]
            part = tl.load(X + index[:, None] * stride + c[None, :], mask=mask, other=0.0)
            e = dot(part, tl.trans(tl.load(HI + f[:, None] * PADDED + c[None, :])), e, PRECISION)
        return e


@triton.jit
def on_grid(e, SPLIT: tl.constexpr):
    """Exponents of 16-bit inputs rounded to ``2^-16``, which a change of scale leaves as they are.

    A difference to an integer is then exact, or so large that the feature is zero.
    """
    if SPLIT:
        # Beyond 64 the last place of this sum is coarser, as is that of the exponent.
        return (e + 192.0) - 192.0
    else:
        return e


@triton.jit
def times_sums(a, sums, acc, PRECISION: tl.constexpr):
    """``acc + a @ sums`` with float32 sums, in two parts where operands have 16 bits."""
    hi = sums.to(a.dtype)
    acc = dot(a, hi, acc, PRECISION)
    if a.dtype == tl.bfloat16:
        acc = dot(a, (sums - hi.to(tl.float32)).to(a.dtype), acc, PRECISION)
    return acc


@triton.jit
def poison(norm):
    """Zero, and NaN for a key that holds NaN or infinity."""
    return tl.where(norm == norm, 0.0, float("nan"))


@triton.jit
def finished(acc, den, peak, broken):
    """Output and logarithm of the normaliser: NaN for a broken row, 0 and -inf for an empty one."""
    empty = den == 0
    safe = tl.where(empty, 1.0, den)
    # Of a number near one: the same for every scale.
    whole = tl.ceil(tl.log2(safe))
    log = tl.where(empty, -INFINITY, (peak + whole) + tl.log2(safe * tl.exp2(-whole)))
    acc = acc / safe[:, None] + tl.where(broken, float("nan"), 0.0)[:, None]
    return acc, tl.where(broken, float("nan"), log)


@triton.jit
def is_broken(x):
    """Rows that hold NaN or infinity."""
    zero = tl.sum(x.to(tl.float32) * 0.0, 1)
    return zero != zero
