"""``favor_state`` and ``merge_states``: states from keys alone."""

from torch import Tensor

from performers.attention.call import AttentionCall
from performers.attention.exact_keys.window_and_sinks import complete_state
from performers.attention.nonfinite import without_nonfinite
from performers.attention.sharding import check_not_sharded
from performers.attention.state import FavorState
from performers.attention.torch_backend.blocks import (
    Features,
    Sums,
    block_rows,
    block_sizes,
    sum_keys,
)
from performers.features import FeatureMap
from performers.features.precision import without_autocast


def favor_state(
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> FavorState:
    """The state after some keys, as a causal call with ``return_state=True`` gives it.

    One pass over the keys, without queries and outputs.

    Keys ``(B, Hkv, S, D)``, values ``(B, Hkv, S, Dv)`` and options are those of
    ``favor_attention``; with a projection for each of H query heads, the state has H heads.

    Raises:
        ValueError: An argument does not fit, or a sequence-parallel context is active.

    Example:
        >>> import torch, performers
        >>> k, v = torch.randn(1, 8, 1000, 64), torch.randn(1, 8, 1000, 64)
        >>> features = performers.SoftmaxFeatures(64, 256)
        >>> performers.favor_state(k, v, features).key_value.shape
        torch.Size([1, 8, 256, 64])
    """
    check_not_sharded("favor_state")
    query = key
    if key.ndim == 4:
        heads = key.shape[1]
        if isinstance(feature_map, FeatureMap) and feature_map.num_heads is not None:
            heads = max(heads, feature_map.num_heads)
        query = key.new_zeros(()).expand(key.shape[0], heads, *key.shape[2:])
    call = AttentionCall(
        query,
        key,
        value,
        feature_map,
        is_causal=True,
        key_mask=key_mask,
        scale=scale,
        window=window,
        sinks=sinks,
        return_state=True,
    ).checked()
    sums = key_sums(call, 0, max(0, key.shape[2] - (window or 0)))
    return complete_state(call, FavorState(*sums))


def merge_states(earlier: FavorState, later: FavorState) -> FavorState:
    """The state after the keys of both, each state made from its keys alone.

    Merging is associative, so that parts of a sequence, or documents, can be read at the same time
    and in any grouping; without exact keys their order does not matter either.

    Args:
        earlier: State of the first keys, without window and sinks.
        later: State of the keys after them, of the same features.

    Raises:
        ValueError: The shapes, dtypes or devices differ, or a state has a window or sinks.
    """
    for name, state in (("earlier", earlier), ("later", later)):
        for option, held in (("window", state.recent_key), ("sinks", state.sink_key)):
            if held is not None:
                raise ValueError(
                    f"merge_states needs states without window and sinks, but {name} has "
                    f"{option}: the keys of `later` met other exact keys than in one sequence; "
                    "continue with favor_attention(..., is_causal=True, state=earlier) over the "
                    "keys of `later`"
                )
    for part in Sums._fields:
        left, right = getattr(earlier, part), getattr(later, part)
        ours, theirs = ((tuple(x.shape), x.dtype, x.device) for x in (left, right))
        if ours != theirs:
            raise ValueError(
                f"later must have {part} of shape {ours[0]}, {ours[1]} on {ours[2]} as earlier "
                f"has, got shape {theirs[0]}, {theirs[1]} on {theirs[2]}: both must come from the "
                "same features, batch and heads"
            )
    return FavorState(*Sums(*earlier.sums()).plus(Sums(*later.sums())))


def key_sums(call: AttentionCall, start: int, stop: int) -> Sums:
    """Sums over the keys ``start`` to ``stop`` of a checked call."""
    features, past = Features.of_call(call), call.replaced(state=None).past()
    part = call.sliced(start, stop)
    part, touched = without_nonfinite(
        part.replaced(
            query=part.query[..., :0, :], is_causal=False, window=None, sink_keys=None, offset=0
        )
    )
    sizes = block_sizes(stop - start, block_rows(call.key.shape[:2], features, call.key.device))
    with without_autocast(call.key.device):
        sums = sum_keys(part, features, Sums(*past.sums()), sizes, keep=None)
    if touched is None:
        return sums
    marked = touched.marked(part.query, FavorState(*sums))[1]
    assert marked is not None
    return Sums(*marked.sums())
