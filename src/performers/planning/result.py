"""What `plan` returns."""

from dataclasses import asdict, dataclass, field
from typing import Any

from performers.features import SoftmaxFeatures
from performers.planning.diagnosis import Diagnosis
from performers.planning.fits import Fits
from performers.planning.samples import Samples
from performers.planning.settings import Setting
from performers.planning.table import plan_text


@dataclass(frozen=True)
class Plan:
    """Measured settings, the best of them, and what queries and keys are like.

    Attributes:
        settings: All that were measured, in the order of the grid.
        front: The Pareto front, error against seconds, fastest first.
        recommended: The setting to take.
        met: Whether it meets the targets; True without any.
        reason: Why it is recommended, in words.
        diagnosis: Of the sample queries and keys.
        exact_seconds: Of ``scaled_dot_product_attention`` in the same rounds.
        exact_multiply_adds: Of exact attention, per query and head.
        length: Positions of the sequence that was timed.
        sample_shape: Batch, heads, key heads, length of a sequence, head_dim of the samples.
        held_out: Sequences, and positions of each, that errors were measured on.
        target_error: As given.
        target_time: As given.
        seed: As given.
        backend: As given.
        samples: All of the samples, to calibrate on.
    """

    settings: tuple[Setting, ...]
    front: tuple[Setting, ...]
    recommended: Setting
    met: bool
    reason: str
    diagnosis: Diagnosis
    exact_seconds: float
    exact_multiply_adds: float
    length: int
    sample_shape: tuple[int, ...]
    held_out: tuple[int, int]
    target_error: float | None
    target_time: float | None
    seed: int
    backend: str | None
    samples: Samples = field(repr=False, compare=False)

    def build(self, setting: Setting | None = None) -> tuple[SoftmaxFeatures, dict[str, Any]]:
        """A feature map and options for ``favor_attention``, calibrated on all of the samples.

        Args:
            setting: One of ``settings``; the recommended one when None.

        Returns:
            The feature map, and keyword arguments ``is_causal``, ``scale``, ``window``, ``sinks``,
            ``listed_keys`` and ``backend``. A ``key_mask`` belongs to a call and is not among them.

        Raises:
            ValueError: ``setting`` is of another type.

        Example:
            ``features, options = plan.build()``, then
            ``favor_attention(query, key, value, features, **options)``.
        """
        chosen = self.recommended if setting is None else setting
        if not isinstance(chosen, Setting):
            raise ValueError(
                f"setting must be one of plan.settings or None, got {type(chosen).__name__}"
            )
        fits = Fits(self.samples, self.seed)
        favor = fits.attention(chosen, chosen.num_heads(self.samples))
        assert isinstance(favor.feature_map, SoftmaxFeatures)
        return favor.feature_map, {
            "is_causal": self.samples.is_causal,
            "scale": self.samples.scale,
            "window": chosen.window,
            "sinks": chosen.sinks,
            "listed_keys": favor.buckets,
            "backend": self.backend,
        }

    def table(self) -> str:
        """What printing the plan shows, with a row for every setting, fastest first."""
        return plan_text(self, every=True)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, in types that ``json`` knows."""
        plain: dict[str, Any] = {
            "settings": [asdict(setting) for setting in self.settings],
            "front": [asdict(setting) for setting in self.front],
            "recommended": asdict(self.recommended),
            "diagnosis": asdict(self.diagnosis),
        }
        for name in self.__dataclass_fields__:
            if name not in plain and name != "samples":
                plain[name] = getattr(self, name)
        return _plain(plain)

    def __str__(self) -> str:
        return plan_text(self)


def _plain(x: Any) -> Any:
    """Lists for tuples, and texts for the keys of dictionaries."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    return [_plain(entry) for entry in x] if isinstance(x, (list, tuple)) else x
