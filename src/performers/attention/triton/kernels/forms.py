"""Features as functions of a projection: their binary logarithms, and what multiplies a slope.

With ``z = W x + b`` in binary units, a feature is ``2^z`` where ``FORM`` is "exponential" and
``EPSILON`` is zero. Others, ``f(z ln 2) + EPSILON``, enter by their logarithms too, at the price of
a second special function for each: scales, rows that underflow and states are then the same for
all, and features of any size are exact.
"""

import triton
import triton.language as tl

from performers.attention.triton.kernels.parts import INFINITY, LARGEST_NORM, LN2, LOWEST


@triton.jit
def logarithms(z, bias, offset, FORM: tl.constexpr, EPSILON: tl.constexpr):
    """``log2 phi + offset`` of the projections ``z + bias``; minus infinity where that is so."""
    if FORM == "exponential" and EPSILON == 0.0:
        return z + (bias + offset)
    else:
        finite = tl.maximum(bias, LOWEST)
        z += finite
        x = z * LN2
        if FORM == "exponential":
            floor = tl.log2(tl.zeros_like(z) + EPSILON)
            log = tl.maximum(z, floor) + tl.log2(1.0 + tl.exp2(-tl.abs(z - floor)))
        elif FORM == "rectified":
            log = tl.log2(tl.maximum(x, 0.0) + EPSILON)
        elif FORM == "absolute":
            log = tl.log2(tl.abs(x) + EPSILON)
        elif FORM == "sigmoid":
            log = tl.log2(1.0 / (1.0 + tl.exp2(-z)) + EPSILON)
        else:
            tl.static_assert(FORM == "elu+1")
            log = tl.log2(tl.where(x > 0.0, x + 1.0, tl.exp2(z)) + EPSILON)
        # Padding has no feature, not one of EPSILON: the difference is minus infinity, else zero.
        return log + (offset + (bias - finite))


@triton.jit
def key_exponents(z, bias, norm, FORM: tl.constexpr, EPSILON: tl.constexpr):
    """Exponents ``(features, keys)``, minus infinity for a key without features."""
    e = logarithms(z, bias[:, None], -norm[None, :], FORM, EPSILON)
    return tl.where((norm < LARGEST_NORM)[None, :], e, -INFINITY)


@triton.jit
def times_slope(h, z, bias, FORM: tl.constexpr, EPSILON: tl.constexpr):
    """``h`` times the derivative of the natural logarithm of the features of ``z + bias``."""
    if FORM == "exponential" and EPSILON == 0.0:
        return h
    else:
        z += bias
        x = z * LN2
        if FORM == "exponential":
            return h / (1.0 + EPSILON * tl.exp2(-z))
        elif FORM == "rectified":
            return h * tl.where(x > 0.0, 1.0 / (x + EPSILON), 0.0)
        elif FORM == "absolute":
            return h * tl.where(x == 0.0, 0.0, tl.where(x > 0.0, 1.0, -1.0) / (tl.abs(x) + EPSILON))
        elif FORM == "sigmoid":
            share = 1.0 / (1.0 + tl.exp2(-z))
            slope = 1.0 - share
            if EPSILON != 0.0:
                slope *= share / (share + EPSILON)
            return h * slope
        else:
            slope = tl.zeros_like(z) + 1.0
            if EPSILON != 0.0:
                exponential = tl.exp2(z)
                slope = exponential / (exponential + EPSILON)
            return h * tl.where(x > 0.0, 1.0 / (x + 1.0 + EPSILON), slope)
