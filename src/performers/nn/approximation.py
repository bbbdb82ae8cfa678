"""Approximation of softmax attention in one layer."""

import operator
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch

from performers.attention import ListedKeys
from performers.features import CALIBRATED, SoftmaxFeatures
from performers.features.projections import Projection
from performers.features.softmax import Estimator
from performers.nn.favor import FavorAttention

NUM_LISTS = 16
"""Default number of lists of keys in a head."""

Self = TypeVar("Self", bound="Approximation")


@dataclass(frozen=True)
class Approximation:
    """Random features, and the pairs of queries and keys that stay exact.

    Attributes:
        num_features: Length of a feature vector; None: the default of ``SoftmaxFeatures``.
        estimator: Estimator of ``SoftmaxFeatures``, as ``projection`` is its projection.
        window: Exact softmax where ``|i - j| <= window``; None: features for every pair.
        sinks: The first ``sinks`` keys are exact for every query.
        listed_keys: Maximum number of keys per query that are exact by their content; 0: none.

    Raises:
        ValueError: A number is out of range, or listed keys go with trigonometric features.
    """

    num_features: int | None = None
    estimator: Estimator = "positive"
    projection: Projection = "orthogonal"
    window: int | None = None
    sinks: int = 0
    listed_keys: int = 0

    def __post_init__(self) -> None:
        for name in ("num_features", "window", "sinks", "listed_keys"):
            value, optional = getattr(self, name), name in ("num_features", "window")
            if value is None and optional:
                continue
            number = as_integer(value)
            if number is None or number < 0:
                expected = "None or an integer" if optional else "an integer"
                raise ValueError(f"{name} must be {expected} of at least 0, got {value!r}")
            object.__setattr__(self, name, number)
        if self.listed_keys and self.estimator == "trigonometric":
            raise ValueError(
                "listed_keys needs positive features, whose estimates can be taken out of a sum; "
                "got estimator='trigonometric'"
            )

    @classmethod
    def from_record(cls: type[Self], record: dict[str, Any]) -> Self:
        """Build the approximation that `record` wrote."""
        # key_list is the name in folders of earlier versions.
        values = {"listed_keys" if k == "key_list" else k: v for k, v in record.items()}
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise ValueError(
                f"the model's configuration has unknown settings of its conversion, {unknown}: it "
                "was saved by another version of performers"
            )
        return cls(**values)

    def record(self) -> dict[str, Any]:
        """Return the fields as plain values, for a configuration file."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def label(self) -> str:
        """Describe the approximation in words; without features, the exact pairs alone."""
        count = "" if self.num_features is None else f" m={self.num_features}"
        parts = [
            "" if self.num_features == 0 else f"{self.estimator}{count}",
            "" if self.projection == "orthogonal" else self.projection,
            "" if self.window is None else f"window {self.window}",
            f"{self.sinks} sinks" if self.sinks else "",
            f"{self.listed_keys} listed keys" if self.listed_keys else "",
        ]
        return ", ".join(filter(None, parts)) + (" alone" if self.num_features == 0 else "")

    @property
    def has_exact_pairs(self) -> bool:
        """True if some pairs are exact."""
        return self.window is not None or self.sinks > 0 or self.listed_keys > 0

    @property
    def is_calibrated(self) -> bool:
        """True if the estimator is fitted to sample queries and keys."""
        return self.estimator in CALIBRATED

    def features(
        self, head_dim: int, num_heads: int, generator: torch.Generator | None = None
    ) -> SoftmaxFeatures:
        """Build the feature map of one layer, with a projection per head."""
        return SoftmaxFeatures(
            head_dim,
            self.num_features,
            estimator=self.estimator,
            projection=self.projection,
            num_heads=num_heads,
            generator=generator,
        )

    def build(
        self,
        head_dim: int,
        num_heads: int,
        *,
        num_lists: int = NUM_LISTS,
        generator: torch.Generator | None = None,
    ) -> FavorAttention:
        """Build the attention of one layer, not calibrated."""
        features = self.features(head_dim, num_heads, generator)
        listed_keys = None
        if self.listed_keys:
            listed_keys = ListedKeys(
                head_dim, num_lists, self.listed_keys, num_heads=num_heads, generator=generator
            )
        return FavorAttention(
            features, window=self.window, sinks=self.sinks, listed_keys=listed_keys
        )


def as_integer(value: Any) -> int | None:
    """Convert an integer, NumPy's included, to int; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
