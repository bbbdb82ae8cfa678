"""What is measured on a pretrained model."""

from dataclasses import dataclass

from performers import backends
from performers.benchmark.groups import Rounds
from performers.benchmark.workload import at_least, one_of, rising


@dataclass(frozen=True, kw_only=True)
class PretrainedSettings(Rounds):
    """What the heads and model parts of ``performers benchmark accuracy`` measure.

    Attributes:
        model: A folder or GGUF file, see ``load_model``.
        text: A text or FASTA file to measure on.
        calibration: Another one to fit to; by default the beginning of ``text``, which is then
            not measured on.
        length: Tokens in a passage.
        passages: Passages to measure on.
        calibration_passages: Passages to fit to.
        layers: Layers whose heads are measured; by default all of a model of up to 8 layers, else
            every fifth and the last.
        num_features: Features per head where estimators are compared.
        feature_counts: Numbers of features of the main variants, rising.
        window: Pairs this close are exact.
        sinks: First keys that are exact in a causal model, with every window.
        keys: Keys listed by content that are exact, per query.
        backend: Of ``favor_attention``; None chooses.
        seed: Of projections, key lists, hidden tokens and the order of turns.
    """

    model: str
    text: str
    calibration: str | None = None
    length: int = 512
    passages: int = 2
    calibration_passages: int = 2
    layers: tuple[int, ...] = ()
    num_features: int = 256
    feature_counts: tuple[int, ...] = (64, 128, 256, 512, 1024)
    window: int = 64
    sinks: int = 4
    keys: int = 64
    backend: str | None = None
    repeats: int = 5
    min_time: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: An option is out of range; the message names it.
        """
        super().__post_init__()
        for name, least in (
            ("length", 2),
            ("passages", 1),
            ("calibration_passages", 1),
            ("window", 2),
            ("sinks", 0),
            ("keys", 1),
            ("seed", 0),
        ):
            at_least(name, getattr(self, name), least)
        rising("feature_counts", self.feature_counts)
        # Half of these make the sines of the trigonometric estimator, half the cosines.
        if self.num_features < 2 or self.num_features % 2:
            raise ValueError(f"num_features must be even and positive, got {self.num_features}")
        if self.length <= self.window + self.sinks + 1:
            raise ValueError(
                f"length must exceed window + sinks + 1 = {self.window + self.sinks + 1}, or "
                f"everything is exact; got {self.length}"
            )
        if self.backend is not None:
            one_of("backend", self.backend, backends())
