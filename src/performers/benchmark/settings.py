"""Settings of the benchmarks; each is a flag of a ``performers benchmark`` command."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from performers.app.options import (
    ESTIMATORS,
    PROJECTIONS,
    Declaration,
    OptionError,
    Options,
    option,
)

if TYPE_CHECKING:
    from performers.benchmark.accuracy_data import GaussianData
    from performers.benchmark.steps import Shape
    from performers.benchmark.workload import Workload
    from performers.features.projections import Projection
    from performers.features.softmax import Estimator

FEATURES = ("softmax", "relu")
DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("bidirectional", "causal")
PASSES = ("forward", "forward+backward")
OBJECTIVES = ("clm", "mlm")
MODEL_ATTENTIONS = ("favor-softmax", "favor-relu", "exact", "identity")

SIZES = {"regular": (8, 6, 2048, 512), "small": (1, 6, 64, 64)}
"""Heads, layers, feed-forward width and width: Choromanski et al. 2021, section 4.1."""

ISOTROPIC, ANISOTROPIC = "isotropic", "anisotropic"
_TWO_SIDED = ("hyperbolic", "trigonometric")


_LENGTHS: dict[str, Any] = {"help": "Tokens, rising, with commas between.", "rising": True}
_MAX_EXACT_LENGTH: dict[str, Any] = {
    "help": "Longest length for quadratic attention; beyond, shown as skipped.",
    "default": 16384,
    "at_least": 0,
}
_REPEATS: dict[str, Any] = {
    "help": "Rounds; every contestant has a turn in each.",
    "at_least": 1,
}
_MIN_TIME: dict[str, Any] = {
    "help": "Seconds each is timed for at least, all rounds together.",
    "at_least": 0,
    "below": math.inf,
}
_THREADS: dict[str, Any] = {
    "help": "Threads of torch; its own choice by default.",
    "default": None,
    "at_least": 1,
    "at_most": 1024,
}
_SEED: dict[str, Any] = {
    "help": "Random seed of inputs, projections and the order of turns.",
    "default": 0,
    "at_least": 0,
    "below": 2**32,
}


@dataclass(frozen=True, kw_only=True)
class Rounds(Options):
    """Repetitions and duration of timings."""

    repeats: int = option(default=9, **_REPEATS)
    min_time: float = option(default=0.5, **_MIN_TIME)
    max_seconds: float = 120.0
    threads: int | None = option(**_THREADS)


@dataclass(frozen=True, kw_only=True)
class Sampling(Rounds):
    """Repetitions and duration of timings, and measurement of memory."""

    max_seconds: float = option(
        "Calls predicted to take longer are skipped, and shown as skipped.",
        120.0,
        at_least=0,
        below=math.inf,
    )
    memory: bool = option("Measure peak memory, each contestant in a process of its own.", True)
    memory_max_length: int = option(
        "Longest length at which memory is measured.", 16384, at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class WorkloadSettings(Options):
    """The shapes of an attention call, all but its length."""

    heads: int = option("Attention heads.", 8, at_least=1)
    head_dim: int = option("Length of a query, key or value vector.", 64, at_least=1)
    num_features: int = option("Random features per head.", 256, at_least=1)
    batch: int = option("Sequences in a call.", 1, at_least=1)
    features: str = option(
        f"Of linear attention: {' or '.join(FEATURES)}.", "softmax", choices=FEATURES
    )
    dtype: str = option(f"Of the inputs: {', '.join(DTYPES)}.", "float32", choices=DTYPES)
    seed: int = option(**_SEED)

    def workload(self) -> Workload:
        """The shapes alone."""
        from performers.benchmark.workload import Workload

        return Workload(**{item.name: getattr(self, item.name) for item in fields(Workload)})


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(WorkloadSettings, Sampling):
    """Settings of ``performers benchmark attention``."""

    lengths: tuple[int, ...] = option(default=(512, 1024, 2048, 4096, 8192, 16384), **_LENGTHS)
    contestants: tuple[str, ...] = option(
        "Names with commas between: performers native, performers torch, SDPA, identity, "
        "performer-pytorch, fast-transformers, fla; all of them by default.",
        (),
    )
    directions: tuple[str, ...] = option(
        f"{', '.join(DIRECTIONS)} or both.", DIRECTIONS, choices=DIRECTIONS
    )
    passes: tuple[str, ...] = option(f"{', '.join(PASSES)} or both.", PASSES, choices=PASSES)
    max_exact_length: int = option(**_MAX_EXACT_LENGTH)
    between_matmuls: bool = option(
        "Time calls between matrix products of a model's size; subtract these.", False
    )

    def __post_init__(self) -> None:
        """Check ranges, and that a contestant can run.

        Raises:
            ValueError: An option is out of range or unknown; the message names its flag.
        """
        super().__post_init__()
        if self.contestants:
            from performers.benchmark.contestants import contestants

            known = contestants()
            Declaration(help="", choices=tuple(known)).check("--contestants", self.contestants)
            if all(known[name].absence for name in self.contestants):
                reasons = ", ".join(f"{name}: {known[name].absence}" for name in self.contestants)
                raise OptionError(f"--contestants has none that can run here ({reasons})")


@dataclass(frozen=True, kw_only=True)
class ShapeSettings(Options):
    """A model and its input, all but the length and the attention."""

    size: str = option(
        f"Of the paper's timing models: {' or '.join(SIZES)}.", "regular", choices=tuple(SIZES)
    )
    objective: str = option(
        f"{OBJECTIVES[0]}: causal; {OBJECTIVES[1]}: masked tokens.", "clm", choices=OBJECTIVES
    )
    batch: int = option("Sequences in a call.", 1, at_least=1)
    num_features: int | None = option("Random features per head; 256 by default.", None, at_least=1)
    dropout: float = option("Dropout probability.", 0.1, at_least=0, below=1)
    seed: int = option(**_SEED)

    def shape(self) -> Shape:
        """The model alone."""
        from performers.benchmark.steps import Shape

        return Shape(**{item.name: getattr(self, item.name) for item in fields(Shape)})


@dataclass(frozen=True, kw_only=True)
class ModelSettings(ShapeSettings, Sampling):
    """Settings of ``performers benchmark model``."""

    lengths: tuple[int, ...] = option(default=(512, 1024, 2048, 4096, 8192), **_LENGTHS)
    attentions: tuple[str, ...] = option(
        f"Of {', '.join(MODEL_ATTENTIONS)}, with commas between.",
        MODEL_ATTENTIONS,
        choices=MODEL_ATTENTIONS,
    )
    max_exact_length: int = option(**_MAX_EXACT_LENGTH)
    repeats: int = option(default=5, **_REPEATS)


@dataclass(frozen=True, kw_only=True)
class DecodeSettings(WorkloadSettings, Rounds):
    """Settings of ``performers benchmark decode``."""

    contexts: tuple[int, ...] = option(
        "Tokens read before, rising, with commas between.",
        (1024, 4096, 16384, 65536, 131072),
        rising=True,
    )
    tokens: int = option("Tokens stepped through in a call.", 16, at_least=1)
    through_model: bool = option("Also decode with the paper's regular model.", False)


@dataclass(frozen=True, kw_only=True)
class KernelSettings(Options):
    """Settings of the kernel part of ``performers benchmark accuracy``."""

    kernel_length: int = option("Queries and keys of the isotropic random data.", 4096, at_least=2)
    head_dim: int = option("Length of its vectors.", 16, at_least=1)
    norms: tuple[int, ...] = option(
        "Mean squared norms of its queries and keys, rising.", (1, 4), rising=True
    )
    anisotropic_length: int = option(
        "Queries and keys of the anisotropic random data.", 1024, at_least=2
    )
    anisotropic_dim: int = option("Length of its vectors.", 64, at_least=1)
    anisotropic_norms: tuple[int, ...] = option(
        "Mean squared norms of its queries and keys, rising.", (2, 4, 8), rising=True
    )
    kernel_feature_counts: tuple[int, ...] = option(
        "Numbers of random features on random data, even and rising.",
        (16, 32, 64, 128, 256, 512),
        rising=True,
    )
    estimators: tuple[str, ...] = option(
        f"On random data, of {', '.join(ESTIMATORS)}.", ESTIMATORS, choices=ESTIMATORS
    )
    projections: tuple[str, ...] = option(
        f"On random data, of {', '.join(PROJECTIONS)}.", PROJECTIONS, choices=PROJECTIONS
    )
    draws: int = option("Draws of random data and projection.", 15, at_least=1)
    threads: int | None = option(**_THREADS)
    seed: int = option(**_SEED)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: An option is out of range or unknown; the message names its flag.
        """
        super().__post_init__()
        if any(count % 2 for count in self.kernel_feature_counts):
            raise OptionError(
                "--kernel-feature-counts must be even, as the two-sided estimators take features "
                f"in pairs, got {list(self.kernel_feature_counts)}"
            )
        if not self.pairs():
            raise OptionError(
                f"--projections must have one besides antithetic for {', '.join(self.estimators)}, "
                "which have opposite rows already"
            )

    def data(self) -> list[GaussianData]:
        """The distributions."""
        from performers.benchmark.accuracy_data import GaussianData

        kinds = (
            (ISOTROPIC, self.norms, self.kernel_length, self.head_dim),
            (ANISOTROPIC, self.anisotropic_norms, self.anisotropic_length, self.anisotropic_dim),
        )
        return [
            GaussianData(f"{kind} {norm}", length, head_dim, norm, kind == ISOTROPIC)
            for kind, norms, length, head_dim in kinds
            for norm in norms
        ]

    def pairs(self) -> list[tuple[Estimator, Projection]]:
        """Estimators with projections, all that exist."""
        return [
            (cast("Estimator", estimator), cast("Projection", projection))
            for estimator in self.estimators
            for projection in self.projections
            if not (estimator in _TWO_SIDED and projection == "antithetic")
        ]


@dataclass(frozen=True, kw_only=True)
class PretrainedSettings(Rounds):
    """Settings of the heads and model parts of ``performers benchmark accuracy``."""

    model: str = option(
        "Folder of a pretrained transformers model, or a .gguf file.", "", path=True
    )
    text: str = option("Text or FASTA file to measure the model on.", "", path=True)
    calibration: str | None = option(
        "Another to calibrate on; by default the beginning of --text.", None, path=True
    )
    length: int = option("Tokens in a passage.", 512, at_least=2)
    passages: int = option("Passages to measure on.", 2, at_least=1)
    calibration_passages: int = option("Passages to calibrate on.", 2, at_least=1)
    layers: tuple[int, ...] = option(
        "Layers whose heads are measured, with commas between; by default all of a small model, "
        "else every fifth and the last.",
        (),
    )
    num_features: int = option(
        "Random features per head where estimators are compared.", 256, at_least=1
    )
    feature_counts: tuple[int, ...] = option(
        "Numbers of features of the main settings, rising.", (64, 128, 256, 512, 1024), rising=True
    )
    window: int = option("Pairs this close are exact in settings with a window.", 64, at_least=2)
    sinks: int = option("First keys that are exact besides, in a causal model.", 4, at_least=0)
    keys: int = option("Keys listed by content that are exact, per query.", 64, at_least=1)
    backend: str | None = option("Of performers.backends(); chosen by default.", None)
    repeats: int = option(default=5, **_REPEATS)
    min_time: float = option(default=0.2, **_MIN_TIME)
    seed: int = option(**_SEED)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: An option is out of range; the message names its flag.
        """
        super().__post_init__()
        # Half of these make the sines of the trigonometric estimator, half the cosines.
        if self.num_features % 2:
            raise OptionError(f"--num-features must be even and positive, got {self.num_features}")
        if self.length <= self.window + self.sinks + 1:
            raise OptionError(
                f"--length must exceed window + sinks + 1 = {self.window + self.sinks + 1}, or "
                f"everything is exact; got {self.length}"
            )
        if self.backend is not None:
            from performers import backends

            Declaration(help="", choices=backends()).check("--backend", self.backend)
