"""Options of ``python -m studies.accuracy``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from performers.app.options import (
    ESTIMATORS,
    PROJECTIONS,
    Declaration,
    OptionError,
    Options,
    option,
)
from performers.benchmark.settings import MIN_TIME, REPEATS, SEED, THREADS, Rounds
from studies.parts import extent

_TWO_SIDED = ("hyperbolic", "trigonometric")


@dataclass(frozen=True, kw_only=True)
class KernelOptions(Options):
    """Options of ``kernel``."""

    kernel_length: int = option("Queries and keys of the isotropic random data.", 4096, at_least=2)
    head_dim: int = option("Length of its vectors.", 16, at_least=1)
    norms: tuple[int, ...] = extent(
        "Mean squared norms of its queries and keys, rising.", (1, 4), rising=True
    )
    anisotropic_length: int = option(
        "Queries and keys of the anisotropic random data.", 1024, at_least=2
    )
    anisotropic_dim: int = option("Length of its vectors.", 64, at_least=1)
    anisotropic_norms: tuple[int, ...] = extent(
        "Mean squared norms of its queries and keys, rising.", (2, 4, 8), rising=True
    )
    kernel_feature_counts: tuple[int, ...] = extent(
        "Numbers of random features, even and rising.", (16, 32, 64, 128, 256, 512), rising=True
    )
    estimators: tuple[str, ...] = option(
        f"Some of {', '.join(ESTIMATORS)}.", ESTIMATORS, choices=ESTIMATORS
    )
    projections: tuple[str, ...] = option(
        f"Some of {', '.join(PROJECTIONS)}.", PROJECTIONS, choices=PROJECTIONS
    )
    draws: int = option("Draws of random data and projection.", 15, at_least=1)
    threads: int | None = option(**THREADS)
    seed: int = option(**SEED)

    def __post_init__(self) -> None:
        """Check ranges."""
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

    def pairs(self) -> list[tuple[Any, Any]]:
        """Estimators with projections, all that exist."""
        return [
            (estimator, projection)
            for estimator in self.estimators
            for projection in self.projections
            if not (estimator in _TWO_SIDED and projection == "antithetic")
        ]


@dataclass(frozen=True, kw_only=True)
class PretrainedOptions(Rounds):
    """Options of ``heads`` and ``models``."""

    model: str = option("Folder of a pretrained transformers model, or a .gguf file.", path=True)
    text: str = option("Text or FASTA file to measure the model on.", path=True)
    calibration: str | None = option(
        "Another to calibrate on; by default the beginning of --text.", None, path=True
    )
    length: int = option("Tokens in a passage.", 512, at_least=2)
    passages: int = option("Passages to measure on.", 2, at_least=1)
    calibration_passages: int = option("Passages to calibrate on.", 2, at_least=1)
    layers: tuple[int, ...] = extent(
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
    backend: str | None = option("One of performers.backends(); chosen by default.", None)
    repeats: int = option(default=5, **REPEATS)
    min_time: float = option(default=0.2, **MIN_TIME)
    seed: int = option(**SEED)

    def __post_init__(self) -> None:
        """Check ranges."""
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


@dataclass(frozen=True, kw_only=True)
class PlanOptions(PretrainedOptions):
    """Options of ``plan``."""

    target_error: float = option("The error that plan is asked for.", 0.3, above=0)
