"""Exact keys chosen by content: hashed buckets, each with a list of keys.

Reformer (Kitaev et al. 2020, arXiv 2001.04451) sends queries and keys into buckets by the largest
of some projections (angular locality-sensitive hashing) and lets those of one bucket meet. Here a
query goes into one bucket, and the bucket lists the keys with the largest inner products with its
direction, those that its queries are likely to attend to; every other key goes through features.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.features import FeatureForm
from performers.features.precision import without_autocast
from performers.features.projections import draw_projection
from performers.features.recomputation import VersionedModule

if TYPE_CHECKING:
    from performers.attention.call import AttentionCall

# Samples per head that the directions are fitted to, and rounds of the fit.
_MOST_SAMPLES = 4096
_FIT_ITERATIONS = 10


class KeyLists(NamedTuple):
    """Lists of keys that each query meets exactly, besides window and sinks.

    Attributes:
        key: Indices of keys, shape ``(rounds, batch, key_heads, lists, n)``, int64.
        taken: Whether the place is taken, same shape, bool.
        of_query: Each query's list, shape ``(rounds, batch, key_heads, groups, L)``, int64.
    """

    key: Tensor
    taken: Tensor
    of_query: Tensor

    def pairs(self, length: int, size: int) -> Tensor:
        """Matrix of the pairs, ``(batch, key_heads, groups, length, size)``, bool."""
        batch, key_heads, groups = self.of_query.shape[1:4]
        matrix = self.taken.new_zeros(batch, key_heads, groups, length, size)
        for listed, taken, of_query in zip(*self, strict=True):
            # One column more than there are keys takes the places that are not taken.
            member = matrix.new_zeros(*listed.shape[:3], size + 1)
            member = member.scatter(3, listed.where(taken, size), True)[..., :size]
            rows = of_query.flatten(2).unsqueeze(-1).expand(-1, -1, -1, size)
            matrix = matrix | member.gather(2, rows).unflatten(2, of_query.shape[2:])
        return matrix

    def biases(self, length: int, size: int) -> None:
        """Matrix of the biases; there are none."""


class ListedKeys(VersionedModule):
    """Directions that send queries into buckets, and list keys for each.

    Bucket ``b`` of query ``q`` has the largest ``c_b . q - |c_b|^2 / 2``, and lists the
    ``num_keys / num_rounds`` keys with the largest ``c_b . k``. Before calibration the ``c_b`` are
    the rows of a random rotation and their opposites, without the norm (angular hashing);
    ``calibrate_`` makes them the centres of clusters of queries (k-means), which finds more of the
    attention. Choosing costs ``num_rounds * num_buckets`` products per query and key, so time stays
    linear in the length.

    In causal attention the lists are made anew every ``refresh`` positions from the keys before:
    which keys a query meets depends on nothing after it.

    Args:
        head_dim: Length of a query or key vector.
        num_buckets: Buckets in a round.
        num_keys: Keys a query meets, over all rounds, at most.
        num_rounds: Independent rounds; their lists are united, and no key counts twice.
        refresh: Positions between new lists in causal attention.
        num_heads: Draw and fit directions per key head; None shares them.
        generator: Source of randomness; torch's default generator when None.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> listed_keys = ListedKeys(64, num_keys=64)
        >>> listed_keys.centers.shape
        torch.Size([1, 1, 16, 64])
    """

    centers: Tensor
    offsets: Tensor

    def __init__(
        self,
        head_dim: int,
        num_buckets: int = 16,
        num_keys: int = 64,
        *,
        num_rounds: int = 1,
        refresh: int = 128,
        num_heads: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("head_dim", head_dim),
            ("num_buckets", num_buckets),
            ("num_keys", num_keys),
            ("num_rounds", num_rounds),
            ("refresh", refresh),
            ("num_heads", num_heads),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_keys % num_rounds:
            raise ValueError(
                f"num_keys must be a multiple of num_rounds ({num_rounds}), got {num_keys}"
            )
        self.head_dim, self.num_buckets, self.num_keys = head_dim, num_buckets, num_keys
        self.num_rounds, self.refresh, self.num_heads = num_rounds, refresh, num_heads
        self._samples: Tensor | None = None
        self.register_buffer("offsets", torch.zeros(num_rounds, num_heads or 1, num_buckets))
        # On the default device, under a device context too, as the offsets are.
        self.register_buffer("centers", self._directions(generator).to(self.offsets.device))

    def _directions(self, generator: torch.Generator | None) -> Tensor:
        """Random rotations and their opposites, ``(rounds, heads, buckets, head_dim)``."""
        rows = torch.stack(
            [
                draw_projection(-(-self.num_buckets // 2), self.head_dim, generator=generator)
                for _ in range(self.num_rounds * (self.num_heads or 1))
            ]
        )
        rows = F.normalize(torch.cat((rows, -rows), dim=1)[:, : self.num_buckets], dim=-1)
        return rows.view(*self.offsets.shape, self.head_dim).float()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all buffers as at construction: freshly drawn, and fitted to nothing."""
        self._samples = None
        self.centers.copy_(self._directions(None))
        self.offsets.zero_()
        self._changed()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The samples behind a fit are not saved: what is loaded is not to be mixed with others.
        self._samples = None
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def calibrate_(
        self, query: Tensor, *, generator: torch.Generator | None = None
    ) -> "ListedKeys":
        """Make the directions the centres of clusters of sample queries.

        Calls add up, to at most 4,096 samples a head.

        Args:
            query: Shape ``(batch, heads, L, head_dim)``; query heads that share a key head, or
                all of them, are pooled.
            generator: Source of randomness for the starting points; a fixed one when None.

        Returns:
            Self.

        Raises:
            ValueError: The shape does not fit, or there is NaN or infinity.
        """
        heads = self.num_heads or 1
        if query.ndim != 4 or query.shape[-1] != self.head_dim or query.shape[1] % heads:
            raise ValueError(
                f"query must have shape (batch, heads, L, {self.head_dim}) with a multiple of "
                f"{heads} heads, got {tuple(query.shape)}"
            )
        if not bool(torch.isfinite(query).all()):
            raise ValueError("query must be finite for calibration, but holds NaN or infinity")
        random = generator or torch.Generator().manual_seed(0)
        samples = query.detach().float().cpu().unflatten(1, (heads, -1)).movedim(1, 0).flatten(1, 3)
        if self._samples is not None:
            samples = torch.cat((self._samples, samples), dim=1)
        if samples.shape[1] > _MOST_SAMPLES:
            samples = samples[:, torch.randperm(samples.shape[1], generator=random)]
            samples = samples[:, :_MOST_SAMPLES]
        self._samples = samples
        for index in range(self.num_rounds):
            centers = _cluster(samples, self.num_buckets, random)
            self.centers[index].copy_(centers)
            self.offsets[index].copy_(-centers.square().sum(-1) / 2)
        self._changed()
        return self

    @torch.no_grad()
    def forward(
        self, query: Tensor, key: Tensor, key_mask: Tensor | None, *, is_causal: bool
    ) -> KeyLists:
        """The exact keys of each query.

        Args:
            query: Shape ``(batch, key_heads, groups, L, head_dim)``.
            key: Shape ``(batch, key_heads, S, head_dim)``.
            key_mask: Shape ``(batch, S)``, True where a key may be listed, or None.
            is_causal: Only keys before a query's stretch of ``refresh`` positions are listed.
        """
        per_round = self.num_keys // self.num_rounds
        found = []
        for centers, offsets in zip(self.centers, self.offsets, strict=True):
            with without_autocast(query.device):
                scores = query.float() @ centers[:, None].mT + offsets[:, None, None]
                strength = centers @ key.float().mT
            bucket = scores.argmax(-1)
            if key_mask is not None:
                strength = strength.masked_fill(~key_mask[:, None, None], -math.inf)
            if is_causal:
                found.append(self._causal(bucket, strength, per_round))
            else:
                top = strength.topk(min(per_round, strength.shape[-1]), dim=-1)
                found.append((top.indices, top.values > -math.inf, bucket))
        return KeyLists(*(torch.stack(tensors) for tensors in zip(*found, strict=True)))

    def _causal(
        self, bucket: Tensor, strength: Tensor, per_round: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lists ``(batch, heads, stretches * buckets, n)`` of the keys before each stretch."""
        length = strength.shape[-1]
        best = strength.new_full((*strength.shape[:-1], per_round), -math.inf)
        place = torch.zeros_like(best, dtype=torch.int64)
        strengths, places = [best], [place]
        for start in range(0, length - self.refresh, self.refresh):
            stretch = strength[..., start : start + self.refresh]
            indices = torch.arange(start, start + self.refresh, device=strength.device)
            best, order = torch.cat((best, stretch), dim=-1).topk(per_round, dim=-1)
            place = torch.cat((place, indices.expand_as(stretch)), dim=-1).gather(-1, order)
            strengths.append(best)
            places.append(place)
        taken = torch.stack(strengths, dim=2).flatten(2, 3) > -math.inf
        stretch = torch.arange(length, device=bucket.device) // self.refresh
        of_query = bucket + stretch * self.num_buckets
        return torch.stack(places, dim=2).flatten(2, 3), taken, of_query

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        heads = "" if self.num_heads is None else f", num_heads={self.num_heads}"
        return (
            f"head_dim={self.head_dim}, num_buckets={self.num_buckets}, num_keys={self.num_keys}, "
            f"num_rounds={self.num_rounds}, refresh={self.refresh}{heads}"
        )


def check_listed_keys(
    listed_keys: ListedKeys, call: "AttentionCall", form: FeatureForm, key_heads: int
) -> None:
    """Check what lists the keys of a call, which has ``key_heads`` after sharing heads.

    Raises:
        ValueError: ``listed_keys`` does not fit the features, the shapes or another option.
    """
    if not isinstance(listed_keys, ListedKeys):
        raise ValueError(
            f"listed_keys must be ListedKeys or None, got {type(listed_keys).__name__}"
        )
    check_positive("listed_keys", form)
    head_dim = call.query.shape[-1]
    if listed_keys.head_dim != head_dim:
        raise ValueError(
            f"listed_keys has head_dim={listed_keys.head_dim} but query has head_dim={head_dim}"
        )
    if listed_keys.num_heads not in (None, key_heads):
        raise ValueError(
            f"listed_keys has num_heads={listed_keys.num_heads}; with {key_heads} key heads (of "
            "the feature map, where it has one per query head) it must be that or None"
        )
    if call.cu_seqlens is not None or call.state is not None or call.return_state:
        name = "state and return_state" if call.cu_seqlens is None else "cu_seqlens"
        raise ValueError(
            f"listed_keys cannot be combined with {name}: their lists are made from one whole "
            "sequence; call without listed_keys, or with the sequences as rows of a padded batch"
        )


def check_positive(name: str, form: FeatureForm) -> None:
    """Check that the estimate of a listed pair can be taken out of a sum.

    Raises:
        ValueError: The features are not positive softmax features.
    """
    if form.kind != "exponential" or not form.quadratic:
        raise ValueError(
            f"{name} needs positive softmax features (SoftmaxFeatures, not trigonometric): other "
            "estimates cannot be exchanged for exp(q . k) key by key"
        )


KeyBuckets = ListedKeys
"""The earlier name of ``ListedKeys``, for programs that use it."""


def _cluster(samples: Tensor, count: int, random: torch.Generator) -> Tensor:
    """K-means centres ``(heads, count, d)`` of ``(heads, n, d)``; some coincide if samples do."""
    start = torch.randperm(samples.shape[1], generator=random)[:count]
    # With fewer samples than buckets, some buckets share a direction.
    start = start.repeat(-(-count // len(start)))[:count]
    centers = samples[:, start]
    for _ in range(_FIT_ITERATIONS):
        nearest = torch.cdist(samples, centers).argmin(-1)
        members = F.one_hot(nearest, count).to(samples.dtype)
        sizes = members.sum(1).unsqueeze(-1)
        centers = (members.mT @ samples / sizes.clamp_min(1)).where(sizes > 0, centers)
    return centers
