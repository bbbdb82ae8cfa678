"""What the linear attention of a converted model is made of."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from performers.attention import ListedKeys
from performers.features import CALIBRATED, SoftmaxFeatures
from performers.features.projections import Projection
from performers.features.softmax import Estimator

__all__ = ["ConversionSettings"]

# Lists of keys in a head: of 128 keys each, 32 left embeddings of all-MiniLM-L6-v2 at a cosine of
# 0.9980 to the original's, 16 at 0.9976.
_LISTS = 32


def _integer(value: Any) -> int | None:
    """The value as int, NumPy's integers included; None if it is no integer."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


@dataclass(frozen=True)
class ConversionSettings:
    """How attention layers become linear: features for the far field, exact terms for the near.

    Attributes:
        num_features: Length of a feature vector; None: the default of ``SoftmaxFeatures``.
        estimator: As in ``SoftmaxFeatures``.
        projection: As in ``SoftmaxFeatures``.
        window: Exact softmax where ``|i - j| <= window``; None: features for every pair.
        sinks: The first ``sinks`` keys are exact for every query.
        key_list: Keys that each query meets exactly because of their content, at most; 0: none.
        layers: Indices of the attention layers that become linear, the others stay exact; None:
            all of them.
        cross_attention: Whether attention from a decoder to an encoder becomes linear too.
        learned: Whether the features are trained parameters, as ``distill`` leaves them.
    """

    num_features: int | None = None
    estimator: Estimator = "positive"
    projection: Projection = "orthogonal"
    window: int | None = None
    sinks: int = 0
    key_list: int = 0
    layers: tuple[int, ...] | None = None
    cross_attention: bool = False
    learned: bool = False

    def __post_init__(self) -> None:
        for name, optional in (
            ("num_features", True),
            ("window", True),
            ("sinks", False),
            ("key_list", False),
        ):
            value = getattr(self, name)
            if value is None and optional:
                continue
            number = _integer(value)
            if number is None or number < 0:
                expected = "None or an integer" if optional else "an integer"
                raise ValueError(f"{name} must be {expected} of at least 0, got {value!r}")
            object.__setattr__(self, name, number)
        if self.key_list and self.estimator == "trigonometric":
            raise ValueError(
                "key_list needs positive features, whose estimates can be taken out of a sum; "
                "got estimator='trigonometric'"
            )
        if self.layers is not None:
            layers = tuple(_integer(x) for x in self.layers)
            if not layers or None in layers:
                raise ValueError(
                    "layers must be None (all) or the indices of the layers to make linear, at "
                    f"least one, got {self.layers}"
                )
            object.__setattr__(self, "layers", layers)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ConversionSettings:
        """The settings that `record` wrote.

        Raises:
            ValueError: A field is not known, as in a model saved by a newer version.
        """
        unknown = sorted(set(record) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"the model's configuration has unknown settings of its conversion, {unknown}: it "
                "was saved by another version of performers"
            )
        layers = record.get("layers")
        return cls(**{**record, "layers": None if layers is None else tuple(layers)})

    def record(self) -> dict[str, Any]:
        """The settings as plain values, for a configuration file."""
        values = asdict(self)
        return {**values, "layers": None if self.layers is None else list(self.layers)}

    @property
    def calibrated(self) -> bool:
        """Whether the estimator is fitted to sample queries and keys."""
        return self.estimator in CALIBRATED

    @property
    def fits(self) -> bool:
        """Whether samples change anything: the estimator or lists are fitted to them."""
        return self.calibrated or self.key_list > 0

    def converts(self, layer: int, count: int) -> bool:
        """Whether a layer becomes linear.

        Args:
            layer: Its index among the attention layers, from 0.
            count: Number of attention layers; negative ``layers`` count from the end.
        """
        if self.layers is None:
            return True
        return any(layer == (x + count if x < 0 else x) for x in self.layers)

    def check_layers(self, count: int) -> None:
        """Refuse ``layers`` that a model does not have.

        Raises:
            ValueError: An index is outside ``[-count, count)``.
        """
        outside = [x for x in self.layers or () if not -count <= x < count]
        if outside:
            raise ValueError(
                f"layers must be in 0..{count - 1}, the model's {count} attention layers, "
                f"got {outside}"
            )

    def feature_map(
        self, head_dim: int, num_heads: int, generator: torch.Generator | None = None
    ) -> SoftmaxFeatures:
        """Features of one layer: one projection a head, that calibration may fit it to the head.

        Args:
            head_dim: Width of queries and keys.
            num_heads: Heads of the keys.
            generator: Where the projection is drawn from.
        """
        return SoftmaxFeatures(
            head_dim,
            self.num_features,
            estimator=self.estimator,
            projection=self.projection,
            num_heads=num_heads,
            generator=generator,
        )

    def buckets(
        self, head_dim: int, num_heads: int, generator: torch.Generator | None = None
    ) -> ListedKeys | None:
        """The lists of keys of one layer, or None.

        Args:
            head_dim: Width of queries and keys.
            num_heads: Heads of the keys.
            generator: Where the directions are drawn from.
        """
        if not self.key_list:
            return None
        return ListedKeys(head_dim, _LISTS, self.key_list, num_heads=num_heads, generator=generator)
