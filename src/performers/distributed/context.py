"""The context in which attention takes its length for one rank's shard of a row."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from performers.attention.call import AttentionCall
from performers.attention.exact_keys.window_and_sinks import check_window_and_sinks
from performers.attention.sharding import sharded
from performers.distributed.attention import attend_shard
from performers.distributed.layout import find_layout
from performers.distributed.messages import gather
from performers.features import FeatureMap
from performers.features.base import form_of_heads

# In place of the hash of boundaries that a call does not pass, or that a GPU holds.
_UNSEEN = -1
_CHECKED_BYTES = 1 << 24


@contextmanager
def sequence_parallel(
    group: dist.ProcessGroup | None = None,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Iterator["SequenceParallel"]:
    """Run attention on one row that is cut over the processes of a group, exactly.

    Inside the ``with`` block every call of ``favor_attention`` takes its queries, keys and values
    for this rank's shard: consecutive positions, rank after rank (`shard` cuts a batch so). Outputs
    and gradients are those of one process on the whole row, to rounding. Window and sinks reach
    across ranks.

    All processes of the group make the same calls in the same order, forward and backward. A
    backward pass that computes checkpoints again runs inside the block. Between ranks travels one
    message for each call, of the size of a state, whatever the length.

    Shards may have different lengths. On a CPU lengths, arguments and features are compared at each
    call. On a GPU reading them would make it wait: they are compared at the first call with each
    feature map in a block, and must not change within it; a process that refuses a later call
    leaves the others waiting until the timeout of the group.

    Args:
        group: The processes of the row; None for all.
        cu_seqlens: Boundaries of the sequences packed into the whole row, from 0 to its length, the
            same on all ranks and read on the host; then the batch size is 1. A call that passes
            ``cu_seqlens`` itself passes those of the whole row, or these, cut to the shard.

    Raises:
        ValueError: In calls inside: ``state``, ``return_state`` or ``listed_keys`` is given, the
            number of keys differs from that of queries, an argument or the features differ between
            ranks, a rank's shard is too short, or another rank refused its arguments.

    Example:
        >>> import torch.distributed as dist
        >>> from performers.distributed import sequence_parallel
        >>> def attend(query, key, value, features):
        ...     with sequence_parallel(dist.group.WORLD):
        ...         return performers.favor_attention(query, key, value, features, is_causal=True)
    """
    boundaries = None
    if cu_seqlens is not None:
        listed = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
        boundaries = tuple(int(x) for x in listed)
    parallel = SequenceParallel(_world() if group is None else group, boundaries)
    with sharded(parallel):
        yield parallel


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None:
        raise ValueError(
            "sequence_parallel needs a process group: call torch.distributed.init_process_group "
            "first, under torchrun or with an init_method"
        )
    return group


class _Header(NamedTuple):
    """A call as ranks compare it: all but its length and cut must be the same.

    Attributes:
        length: Positions of the shard.
        cut: Hash of the boundaries that the call itself has, or `_UNSEEN`.
    """

    length: int
    cut: int
    batch: int
    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    num_features: int
    is_causal: int
    window: int
    sinks: int
    scale: int
    cu_seqlens: int
    dtype: int
    requires_grad: int


# Options of an attention call that a shard takes; any other raises where it is not its default.
_SHARDED = ("is_causal", "key_mask", "cu_seqlens", "scale", "window", "sinks")

# Compared by hashes, which say nothing in a message.
_HASHED = ("scale", "cu_seqlens", "dtype", "requires_grad")


class _Seen(NamedTuple):
    version: int
    header: _Header
    lengths: tuple[int, ...]
    cuts: tuple[int, ...]


class SequenceParallel:
    """A row over the processes of a group, as `sequence_parallel` yields it.

    Attributes:
        group: The processes.
        boundaries: Those of packed sequences in the whole row, or None.
        calls: Attention calls so far, recomputed ones included.
        message_bytes: Bytes that this rank published in its last call. Its gradient is summed over
            all ranks, so that the backward pass sums as many bytes for each of them.
    """

    def __init__(self, group: dist.ProcessGroup, boundaries: tuple[int, ...] | None) -> None:
        self.group, self.boundaries = group, boundaries
        self.calls = self.message_bytes = 0
        # True on a rank after the first where a model counts its positions from 0.
        self._begins_again: Tensor | bool = False
        self._seen: WeakKeyDictionary[FeatureMap, _Seen] = WeakKeyDictionary()

    @property
    def row(self) -> tuple[str, tuple[int, ...] | None]:
        """Name of the group, and the boundaries."""
        return self.group.group_name, self.boundaries

    @_disable_dynamo
    def tell_positions(self, position_ids: Tensor) -> None:
        """Take the positions ``(B, L)``, without padding, that the next calls of a model are for.

        They begin at 0 on the first rank alone, but where a packed sequence begins.
        """
        later = self.boundaries is None and dist.get_rank(self.group) > 0
        self._begins_again = (position_ids[..., 0] == 0).any() if later else False

    # A graph break to torch.compile, as collectives and numbers read from tensors are.
    @_disable_dynamo
    def attend(self, call: AttentionCall, backend: str | None) -> Tensor:
        """The output ``(batch, key_heads, groups, L, value_dim)`` of this rank's shard."""
        sinks, given, boundaries = call.sinks, call.cu_seqlens, self.boundaries
        header: _Header | ValueError
        try:
            _check_options(call)
            check_window_and_sinks(call, form_of_heads(call.feature_map, call.query, call.key))
            # Sinks and boundaries are those of the whole row.
            call.sinks, call.cu_seqlens = 0, None
            call = call.checked()
            if boundaries is None and given is not None:
                boundaries, given = tuple(given.tolist()), None
            header = _header(call, sinks, boundaries, given)
        except ValueError as error:
            header = error
        lengths, cuts = self._agree(call, header)
        if self.boundaries is not None and set(cuts) != {_UNSEEN}:
            _check_cuts(cuts, lengths, self.boundaries)
        layout = find_layout(lengths, dist.get_rank(self.group), boundaries, call.window)
        out, self.message_bytes = attend_shard(
            call, layout, sinks, self.group, backend, packed=boundaries is not None
        )
        self.calls += 1
        return out

    def _agree(
        self, call: AttentionCall, header: _Header | ValueError
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths of all shards, and their boundaries as hashes; the rest is the same on all."""
        features, device = call.feature_map, call.query.device
        seen = None
        if device.type != "cpu" and isinstance(features, FeatureMap):
            seen = self._seen.get(features)
        if seen is not None and seen.version == features._buffers_version:
            # No comparison: the other ranks take part in none.
            if isinstance(header, ValueError):
                raise header
            # The last number is of gradients, which a recomputation needs and its first pass not.
            if seen.header[:-1] != header[:-1]:
                raise ValueError(
                    "query and the options of a layer must keep their shapes and values within one "
                    "sequence_parallel block on a GPU, where ranks compare them once: enter a "
                    "block for each"
                )
            return seen.lengths, seen.cuts
        names = ("refused", "begins_again", *_Header._fields, "feature_map")
        own = torch.zeros(len(names), dtype=torch.int64, device=device)
        if isinstance(header, ValueError):
            own[0] = 1
        else:
            own[1] = self._begins_again
            own[2:-1] = torch.tensor(header, device=device)
            named = sorted(chain(features.named_parameters(), features.named_buffers()))
            own[-1] = _checksum(tensor for _, tensor in named)
        rows = gather(own, self.group).tolist()
        if isinstance(header, ValueError):
            raise header
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        if any(columns["refused"]):
            ranks = [rank for rank, refused in enumerate(columns["refused"]) if refused]
            raise ValueError(
                f"favor_attention refused its arguments on ranks {ranks}: see the error of those "
                "processes"
            )
        if any(columns["begins_again"]):
            raise ValueError(
                f"position_ids begin again at 0 on rank {columns['begins_again'].index(1)} of one "
                "row: pass a model those of the whole row (performers.distributed.shard adds "
                "them), and the boundaries of packed sequences to sequence_parallel(cu_seqlens=...)"
            )
        for name in _Header._fields[2:]:
            if len(set(columns[name])) > 1:
                values = "differs" if name in _HASHED else f"they have {list(columns[name])}"
                remedy = "; boundaries of the whole row go to sequence_parallel(cu_seqlens=...)"
                raise ValueError(
                    f"{name} must be the same on all ranks of sequence_parallel, but {values}"
                    f"{remedy if name == 'cu_seqlens' else ''}"
                )
        if len(set(columns["feature_map"])) > 1:
            raise ValueError(
                "feature_map must hold the same numbers on all ranks of sequence_parallel, but "
                f"its checksums are {list(columns['feature_map'])}: seed all processes alike "
                "before the features are drawn, load one checkpoint, or broadcast from rank 0"
            )
        seen = _Seen(features._buffers_version, header, columns["length"], columns["cut"])
        self._seen[features] = seen
        return seen.lengths, seen.cuts


def _check_options(call: AttentionCall) -> None:
    for argument in fields(AttentionCall):
        name, default = argument.name, argument.default
        if not argument.init or default is MISSING or name in _SHARDED:
            continue
        if getattr(call, name) is not default:
            raise ValueError(
                f"{name} cannot be combined with performers.distributed.sequence_parallel: call "
                "favor_attention on whole rows, outside the context (of a model: use_cache=False)"
            )
    if call.query.ndim == call.key.ndim == 4 and call.query.shape[2] != call.key.shape[2]:
        raise ValueError(
            f"key must have as many positions as query ({call.query.shape[2]}) inside "
            f"performers.distributed.sequence_parallel, got {call.key.shape[2]}: it covers "
            "self-attention; call cross attention outside the context, on whole rows of keys"
        )


def _header(
    call: AttentionCall, sinks: int, boundaries: tuple[int, ...] | None, given: Tensor | None
) -> _Header:
    batch, key_heads, groups, length, head_dim = call.query.shape
    if boundaries is not None and batch != 1:
        raise ValueError(f"cu_seqlens needs batch size 1, got batch size {batch}")
    tensors = (call.query, call.key, call.value, *call.feature_map.parameters())
    needs_grad = [torch.is_grad_enabled() and x.requires_grad for x in tensors]
    cut = given.tolist() if given is not None and given.device.type == "cpu" else None
    return _Header(
        length=length,
        cut=_UNSEEN if cut is None else _hash(cut),
        batch=batch,
        query_heads=key_heads * groups,
        key_heads=key_heads,
        head_dim=head_dim,
        value_dim=call.value.shape[-1],
        num_features=call.form.num_features,
        is_causal=int(call.is_causal),
        window=-1 if call.window is None else call.window,
        sinks=sinks,
        scale=_hash([call.factor]),
        cu_seqlens=-1 if boundaries is None else _hash(boundaries),
        dtype=_hash([call.dtype, call.key.dtype, call.value.dtype]),
        requires_grad=_hash(needs_grad),
    )


def _hash(values: Iterable[object]) -> int:
    return zlib.crc32(repr(tuple(values)).encode())


def _check_cuts(
    cuts: tuple[int, ...], lengths: tuple[int, ...], boundaries: tuple[int, ...]
) -> None:
    """Compare the boundaries that each rank passed, as hashes, with those of the context."""
    for rank, cut in enumerate(cuts):
        local = (0, *find_layout(lengths, rank, boundaries, None).inner)
        if cut not in (_UNSEEN, _hash(local), _hash(boundaries)):
            raise ValueError(
                f"cu_seqlens of rank {rank} are not those of sequence_parallel, whole or cut to "
                f"its shard, {local}: pass one description of the packed row"
            )


def check_alike(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Compare all parameters and buffers of a module over processes.

    FSDP2 broadcasts neither, DistributedDataParallel both.

    Args:
        module: The same module on all ranks, before its parameters are sharded.
        group: The processes; None for all.

    Raises:
        ValueError: A parameter or a buffer differs between ranks; the same on all ranks.
    """
    group = _world() if group is None else group
    named = [*module.named_parameters(), *module.named_buffers()]
    own = torch.stack([_checksum([tensor]) for _, tensor in named])
    rows = gather(own, group)
    differs = (rows != rows[0]).any(0).tolist()
    names = [name for (name, _), different in zip(named, differs, strict=True) if different]
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"{shown} must hold the same numbers on all ranks: seed all processes alike before the "
            "model is made, or load one checkpoint"
        )


def _checksum(tensors: Iterable[Tensor]) -> Tensor:
    """A number of the bits of all tensors."""
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        # In parts, since the products take eight times the memory.
        for part in tensor.detach().flatten().contiguous().view(torch.uint8).split(_CHECKED_BYTES):
            places = torch.arange(1, part.numel() + 1, device=part.device)
            total = total.to(part.device) * 31 + (part.long() * places).sum()
    return total
