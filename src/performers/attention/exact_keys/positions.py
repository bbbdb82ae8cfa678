"""Windows measured in positions that tokens share, such as those of unaligned relatives.

Rows are laid end to end, and a token's coordinate is its position, shifted so that tokens of
different sequences are further apart than the window. One order of the coordinates then has the
window of each query as a run of neighbouring keys.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from performers.attention.call import AttentionCall

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_LARGEST = 2**62


class Coordinates(NamedTuple):
    """Places of the tokens of all rows, laid end to end.

    Attributes:
        coordinate: Shape ``(batch S,)``, int64, rising from sequence to sequence. Tokens are within
            the window of each other where it differs by ``window`` at most.
        sequence: Number of each token's sequence, shape ``(batch S,)``; None for one sequence.
    """

    coordinate: Tensor
    sequence: Tensor | None


def check_positions(call: "AttentionCall") -> None:
    """Check the option ``positions`` of a call, whose window is checked already.

    Raises:
        ValueError: Positions do not fit, or do not go with another option.
    """
    positions = call.positions
    if positions is None:
        return
    shape = (call.key.shape[0], call.key.shape[2])
    if positions.shape != shape or positions.dtype not in _INTEGERS:
        raise ValueError(
            f"positions must be integers of shape {shape}, one for each key, got "
            f"{positions.dtype} {tuple(positions.shape)}"
        )
    if call.window is None:
        raise ValueError("positions needs window, which is measured in them")
    for name in ("listed_keys", "neighbours"):
        if getattr(call, name) is not None:
            raise ValueError(f"positions cannot be combined with {name}; leave one of the two out")
    if call.is_causal:
        raise ValueError(
            "positions needs is_causal=False: keys within a window of positions come later in the "
            "row"
        )


def find_coordinates(call: "AttentionCall") -> Coordinates:
    """Coordinates of the tokens of a checked call with positions.

    Raises:
        ValueError: Positions are so far apart that coordinates exceed 64 bits.
    """
    assert call.positions is not None
    assert call.window is not None
    positions = call.positions.to(call.query.device, torch.int64)
    batch, length = positions.shape
    sequence = call.segments
    if batch > 1:
        sequence = torch.arange(batch, device=positions.device).repeat_interleave(length)
    first = positions.min()
    coordinate = (positions - first).flatten()
    if sequence is None:
        return Coordinates(coordinate, None)
    stride = coordinate.max() + call.window + 2
    if int(stride) * (int(sequence.max()) + 1) > _LARGEST:
        raise ValueError(
            f"positions must span less, got {int(coordinate.max())} with window={call.window}; "
            "let those of each sequence begin at 0"
        )
    return Coordinates(coordinate + sequence * stride, sequence)
