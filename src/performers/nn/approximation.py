"""How softmax attention is approximated in one layer."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch

from performers.attention import ListedKeys
from performers.features import CALIBRATED, SoftmaxFeatures
from performers.features.projections import Projection
from performers.features.softmax import Estimator
from performers.nn.favor import FavorAttention

Self = TypeVar("Self", bound="Approximation")


@dataclass(frozen=True)
class Approximation:
    """Random features, and the pairs of queries and keys that are exact.

    Attributes:
        num_features: Length of a feature vector; None: the default of ``SoftmaxFeatures``.
        estimator: As in ``SoftmaxFeatures``.
        projection: As in ``SoftmaxFeatures``.
        window: Exact softmax where ``|i - j| <= window``; None: features for every pair.
        sinks: The first ``sinks`` keys are exact for every query.
        listed_keys: Keys that each query meets exactly because of their content, at most; 0: none.

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
        """The approximation that `record` wrote."""
        if "key_list" in record:
            # The name in folders of earlier versions.
            record = {("listed_keys" if k == "key_list" else k): v for k, v in record.items()}
        unknown = sorted(set(record) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"the model's configuration has unknown settings of its conversion, {unknown}: it "
                "was saved by another version of performers"
            )
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """The fields as plain values, for a configuration file."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def label(self) -> str:
        """The approximation in words; without features, the exact pairs alone."""
        parts = []
        if self.num_features != 0:
            count = "" if self.num_features is None else f" m={self.num_features}"
            parts.append(f"{self.estimator}{count}")
        if self.projection != "orthogonal":
            parts.append(self.projection)
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.sinks:
            parts.append(f"{self.sinks} sinks")
        if self.listed_keys:
            parts.append(f"{self.listed_keys} listed keys")
        return ", ".join(parts) + (" alone" if self.num_features == 0 else "")

    @property
    def has_exact_pairs(self) -> bool:
        """Whether any key is met exactly."""
        return self.window is not None or self.sinks > 0 or self.listed_keys > 0

    @property
    def is_calibrated(self) -> bool:
        """Whether the estimator is fitted to sample queries and keys."""
        return self.estimator in CALIBRATED

    def features(
        self, head_dim: int, num_heads: int, generator: torch.Generator | None = None
    ) -> SoftmaxFeatures:
        """The feature map of one layer, with a projection a head."""
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
        num_lists: int = 16,
        generator: torch.Generator | None = None,
    ) -> FavorAttention:
        """The attention of one layer, not calibrated."""
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
    """The value as int, NumPy's integers included; None if it is no integer."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
