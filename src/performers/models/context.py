"""Arguments of a forward call that all layers share."""

from typing import NamedTuple

from torch import Tensor, nn

from performers.models.cache import PerformerCache


class AttentionContext(NamedTuple):
    """Arguments of a forward call that all layers share.

    Attributes:
        is_causal: Token ``i`` attends to tokens up to ``i`` only.
        key_mask: Shape ``(B, L)``, True = takes part, or None.
        sequence_ids: Shape ``(B, L)``: tokens of different ids do not attend to each other, or
            None.
        cu_seqlens: The same as boundaries along the concatenated rows, or None.
        cache: Cache of the past, or None.
        rotary: Cosines and sines of the angles, or None.
        position_ids: Positions, shape ``(B, L)``, or None.
        counts_up: Positions of the tokens of a row that take part count up by one, so that windows
            over positions are windows in the row.
        need_weights: Also return the attention matrix.
        choices: Discrete choices of modules, such as buckets, which a module stores and reads in
            this dictionary where a layer is recomputed from inputs that differ by rounding. None:
            layers are computed once.
    """

    is_causal: bool
    key_mask: Tensor | None = None
    sequence_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cache: PerformerCache | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    position_ids: Tensor | None = None
    counts_up: bool = False
    need_weights: bool = False
    choices: dict[nn.Module, Tensor] | None = None
