"""What all layers of one forward call share."""

from typing import NamedTuple

from torch import Tensor, nn

from performers.models.cache import PerformerCache


class AttentionContext(NamedTuple):
    """What all layers of one forward call share.

    Attributes:
        is_causal: Token ``i`` sees tokens up to ``i`` only.
        key_mask: Shape ``(B, L)``, True = takes part, or None.
        sequence_ids: Shape ``(B, L)``: tokens of different ids do not see each other, or None.
        cu_seqlens: The same as boundaries along all rows laid end to end, or None.
        cache: The past, or None.
        rotary: Angles, or None.
        need_weights: Also return the attention matrix.
        choices: What modules chose, such as buckets, and where they keep it: a layer computed once
            more, from inputs that differ by rounding, must not choose otherwise. None: the layer
            is computed once.
    """

    is_causal: bool
    key_mask: Tensor | None = None
    sequence_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cache: PerformerCache | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    need_weights: bool = False
    choices: dict[nn.Module, Tensor] | None = None
