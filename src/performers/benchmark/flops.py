"""Floating-point operations of attention: what a kernel must do, whatever it does besides.

Only the products count, a multiplication and an addition each. Exponentials, normalisers and what a
backward pass recomputes do not: two kernels that return the same numbers get the same count, and
GFLOP/s compare their speed and not their waste.
"""

CAUSAL_CHUNK = 64
"""Tokens in a block of chunked causal attention, as the counts here assume."""


def favor_forward(
    *,
    length: int,
    num_features: int,
    head_dim: int,
    value_dim: int | None = None,
    heads: int = 1,
    batch: int = 1,
    is_causal: bool = False,
    chunk: int = CAUSAL_CHUNK,
) -> int:
    """Operations of linear attention's forward pass.

    Projections of queries and keys take ``2 L m D`` each, ``S = phi(k)^T v`` and ``phi(q) S`` take
    ``2 L m Dv`` each: ``8 L m D`` a head with ``Dv = D``. Chunked causal attention adds, inside the
    blocks of ``C`` tokens, the lower half of ``phi(q) phi(k)^T`` and of its product with ``v``:
    ``L C (m + Dv)``.

    Args:
        length: Tokens ``L``.
        num_features: Features ``m``.
        head_dim: ``D``.
        value_dim: ``Dv``; ``D`` when None.
        heads: Heads.
        batch: Sequences.
        is_causal: Whether to count a causal pass.
        chunk: ``C``; shorter sequences are one block.

    Returns:
        The count.
    """
    value_dim = head_dim if value_dim is None else value_dim
    count = 4 * length * num_features * (head_dim + value_dim)
    if is_causal:
        count += length * min(chunk, length) * (num_features + value_dim)
    return batch * heads * count


def exact_forward(
    *,
    length: int,
    head_dim: int,
    value_dim: int | None = None,
    heads: int = 1,
    batch: int = 1,
    is_causal: bool = False,
) -> int:
    """Operations of softmax attention's forward pass: ``4 L^2 D`` a head, causal half of it.

    Args:
        length: Tokens ``L``.
        head_dim: ``D``.
        value_dim: ``Dv``; ``D`` when None.
        heads: Heads.
        batch: Sequences.
        is_causal: Whether each token sees its past only.

    Returns:
        The count.
    """
    value_dim = head_dim if value_dim is None else value_dim
    count = 2 * length * length * (head_dim + value_dim)
    return batch * heads * (count // 2 if is_causal else count)


def of_pass(forward: int, name: str) -> int:
    """Operations of ``"forward"`` or ``"forward+backward"``, given those of the forward pass.

    The backward pass has twice the forward's: every product has two in it, one for each factor.
    The gradients of the projections are not wanted, but the two projections are computed again
    because features are not kept, so the rule holds for linear attention too.
    """
    return {"forward": 1, "forward+backward": 3}[name] * forward
