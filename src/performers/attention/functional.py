"""``favor_attention`` and ``favor_attention_weights``."""

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from performers.attention.backends import resolve_backend
from performers.attention.call import AttentionCall, AttentionOptions, PairOptions
from performers.attention.exact_keys.listed_keys import ListedKeys
from performers.attention.exact_keys.neighbours import Neighbours
from performers.attention.exact_keys.window_and_sinks import complete_state
from performers.attention.reference import attention_matrix
from performers.attention.sharding import check_not_sharded, sharding_of_call
from performers.attention.state import FavorState
from performers.features import FeatureMap
from performers.features.precision import autocast_dtype, without_autocast

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PAIR_OPTIONS = tuple(PairOptions.__annotations__)


@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    return_state: Literal[False] = ...,
    **options: "Unpack[AttentionOptions]",
) -> Tensor: ...


@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    return_state: Literal[True],
    **options: "Unpack[AttentionOptions]",
) -> tuple[Tensor, FavorState]: ...


def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    listed_keys: ListedKeys | None = None,
    neighbours: Neighbours | None = None,
    neighbour_bias: Tensor | None = None,
    positions: Tensor | None = None,
    state: FavorState | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, FavorState]:
    """Attention through random features, in time and memory linear in the sequence length.

    ``out_i = sum_j K(q_i, k_j) v_j / sum_j K(q_i, k_j)`` with ``K(q, k) = phi(q) . phi(k)``, where
    ``phi`` is ``feature_map`` applied to ``sqrt(scale) q`` and ``sqrt(scale) k``. With softmax
    features ``K`` is an unbiased estimate of ``exp(scale * q . k)``. Source: Choromanski et al.
    2021 (arXiv 2009.14794), equations 3 to 5 and section 2.5.

    Layout, scale and the rule for grouped heads are those of
    ``torch.nn.functional.scaled_dot_product_attention``. Sums are kept in float32 at least,
    whatever the input's dtype; float64 is computed in float64.

    Args:
        query: Shape ``(B, H, L, D)``.
        key: Shape ``(B, Hkv, S, D)``; ``Hkv`` divides ``H`` and each key head serves ``H / Hkv``
            consecutive query heads.
        value: Shape ``(B, Hkv, S, Dv)``.
        feature_map: ``SoftmaxFeatures`` or ``GeneralizedFeatures`` with ``head_dim == D``. With a
            projection per head, its ``num_heads`` is ``H`` or ``Hkv``.
        is_causal: Query ``i`` sees keys ``0..i`` only, exactly. Needs ``L == S``; a state supplies
            the past.
        key_mask: Bool, shape ``(B, S)``, True = the key takes part. What a masked key or value
            holds does not matter. A query with nothing to attend to gives zeros.
        cu_seqlens: Int32 or int64, shape ``(N + 1,)``, first 0 and last ``L``: N sequences packed
            on the length axis with ``B == 1`` and ``L == S``, each attending to itself only. Its
            numbers are checked on the CPU only: on a GPU the check would make it wait.
        scale: Factor on ``q . k``; ``1 / sqrt(D)`` when None.
        window: Meet keys with ``|i - j| <= window`` exactly, with ``exp(scale * q . k)``, and all
            others through features, under one normaliser; softmax features only, and as many keys
            as queries. A window that covers the sequence is exact attention. None for no window.
        sinks: Meet the first ``sinks`` keys that take part exactly; softmax features only.
        listed_keys: Meet the keys that these list for a query exactly; positive softmax features
            only, without ``cu_seqlens`` and states.
        neighbours: Meet the neighbours of a node exactly: ``indptr`` of shape ``(L + 1,)`` and
            ``indices`` of shape ``(E,)`` of a sparse matrix in CSR form, so that query ``i`` meets
            the keys ``indices[indptr[i]:indptr[i + 1]]``, in any order, each once. All heads and
            batch rows share them; with ``cu_seqlens`` they count from the start of the packed row,
            and stay within a sequence. Positive softmax features only, in both directions, without
            window, sinks and listed keys. Their numbers are checked, which a GPU waits for, but
            not under ``torch.compile``.
        neighbour_bias: Added to ``scale * q . k`` of these pairs, shape ``(E,)`` or ``(H, E)``;
            minus infinity takes a pair out.
        positions: Integers of shape ``(B, S)`` in which the window is measured in place of places
            in the row: exact where ``|p_i - p_j| <= window``. Tokens may share a position, as those
            of unaligned relatives laid end to end do. Not causal, without listed keys and
            neighbours. Time and memory are those of a window of as many tokens as lie within it.
            Under ``torch.compile`` with ``native`` alone.
        state: Past of a causal call, as returned by an earlier one.
        return_state: Also return the state after the last key (causal only).
        backend: One of ``performers.backends()``, which has to cover the call; None chooses the
            best that does.

    Returns:
        Output of shape ``(B, H, L, Dv)`` in the input's dtype (under autocast, in autocast's), or
        a pair of it and the ``FavorState``.

    Raises:
        ValueError: An argument does not fit; the message names it and says what was expected.

    Example:
        >>> import torch, performers
        >>> q, k, v = (torch.randn(1, 8, 1000, 64) for _ in range(3))
        >>> features = performers.SoftmaxFeatures(64, 256)
        >>> performers.favor_attention(q, k, v, features, is_causal=True).shape
        torch.Size([1, 8, 1000, 64])
    """
    call = AttentionCall(
        query,
        key,
        value,
        feature_map,
        is_causal=is_causal,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        scale=scale,
        window=window,
        sinks=sinks,
        listed_keys=listed_keys,
        neighbours=neighbours,
        neighbour_bias=neighbour_bias,
        positions=positions,
        state=state,
        return_state=return_state,
    )
    sharding = sharding_of_call(call)
    if sharding is not None:
        out = sharding.attend(call, backend)
        return out.flatten(1, 2).to(_output_dtype(query, key, value))
    call = call.checked()
    out, sums = resolve_backend(backend, call).attend(call)
    out = out.flatten(1, 2).to(_output_dtype(query, key, value))
    if not return_state:
        return out
    assert sums is not None
    return out, complete_state(call, sums)


def favor_attention_weights(
    query: Tensor, key: Tensor, feature_map: FeatureMap, **options: "Unpack[PairOptions]"
) -> Tensor:
    """The attention matrix that ``favor_attention`` implies; for analysis, quadratic on purpose.

    Args:
        query: Shape ``(B, H, L, D)``.
        key: Shape ``(B, Hkv, S, D)``.
        feature_map: As in ``favor_attention``.
        **options: ``is_causal``, ``key_mask``, ``scale``, ``window``, ``sinks``, ``listed_keys``,
            ``neighbours``, ``neighbour_bias`` and ``positions``, as in ``favor_attention``.

    Returns:
        Shape ``(B, H, L, S)``. Rows sum to one; the row of a query with nothing to attend to is
        zero.

    Raises:
        ValueError: An argument does not fit.
        TypeError: An option is unknown, or one of ``favor_attention`` alone.
    """
    check_not_sharded("favor_attention_weights")
    unknown = [name for name in options if name not in _PAIR_OPTIONS]
    if unknown:
        raise TypeError(
            f"favor_attention_weights takes no {', '.join(unknown)}: the matrix is that of one "
            f"whole sequence, with the options {', '.join(_PAIR_OPTIONS)}"
        )
    call = AttentionCall(query, key, key, feature_map, **options).checked()
    with without_autocast(query.device):
        weights = attention_matrix(call)
    return weights.flatten(1, 2).to(_output_dtype(query, key))


def _output_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = autocast_dtype(tensors[0].device)
    return tensors[0].dtype if dtype is None or tensors[0].dtype == torch.float64 else dtype
