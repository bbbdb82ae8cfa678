"""Settings of the benchmarks; each is a flag of a ``performers benchmark`` command."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from performers.app.options import Declaration, OptionError, Options, option

_extent = partial(option, changes_result=False)
"""An option that says how much is measured: a resumed run may have another."""

FEATURES = ("softmax", "relu")
DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = ("bidirectional", "causal")
PASSES = ("forward", "forward+backward")
OBJECTIVES = ("clm", "mlm")
MODEL_ATTENTIONS = ("favor-softmax", "favor-relu", "exact", "identity")

SIZES = {"regular": (8, 6, 2048, 512), "small": (1, 6, 64, 64)}
"""Heads, layers, feed-forward width and width: Choromanski et al. 2021, section 4.1."""

LENGTHS: dict[str, Any] = {"help": "Tokens, rising, with commas between.", "rising": True}
REPEATS: dict[str, Any] = {"help": "Rounds; each contestant has one turn a round.", "at_least": 1}
MIN_TIME: dict[str, Any] = {
    "help": "Least seconds that each contestant is timed for, all rounds together.",
    "at_least": 0,
    "below": math.inf,
}
THREADS: dict[str, Any] = {
    "help": "Threads of torch; torch's default otherwise.",
    "default": None,
    "at_least": 1,
    "at_most": 1024,
}
SEED: dict[str, Any] = {
    "help": "Random seed of inputs, projections and the order of turns.",
    "default": 0,
    "at_least": 0,
    "below": 2**32,
}
"""Options that several benchmarks and studies have."""


@dataclass(frozen=True, kw_only=True)
class Rounds(Options):
    """Repetitions and duration of timings."""

    repeats: int = option(default=9, **REPEATS)
    min_time: float = option(default=0.5, **MIN_TIME)
    max_seconds: float = 120.0
    threads: int | None = option(**THREADS)


@dataclass(frozen=True, kw_only=True)
class Sampling(Rounds):
    """Repetitions and duration of timings, and measurement of memory."""

    max_seconds: float = _extent(
        "Calls predicted to take longer are skipped, and shown as skipped.",
        120.0,
        at_least=0,
        below=math.inf,
    )
    memory: bool = _extent("Measure peak memory, each contestant in a process of its own.", True)
    memory_max_length: int = _extent(
        "Longest length at which memory is measured.", 16384, at_least=0
    )

    def measures_memory(self, length: int) -> bool:
        """True where peak memory is measured at a length."""
        return self.memory and length <= self.memory_max_length


@dataclass(frozen=True, kw_only=True)
class SweptSampling(Sampling):
    """Settings of a benchmark against length that has a quadratic contestant."""

    max_exact_length: int = _extent(
        "Longest length for quadratic attention; beyond, shown as skipped.", 16384, at_least=0
    )

    def skip_exact(self, length: int) -> str | None:
        """The reason to leave out quadratic attention, or None."""
        if length <= self.max_exact_length:
            return None
        return f"longer than max_exact_length ({self.max_exact_length})"


@dataclass(frozen=True, kw_only=True)
class Workload(Options):
    """Shapes of an attention call, except its length."""

    heads: int = option("Attention heads.", 8, at_least=1)
    head_dim: int = option("Length of a query, key or value vector.", 64, at_least=1)
    num_features: int = option("Random features per head.", 256, at_least=1)
    batch: int = option("Sequences in a call.", 1, at_least=1)
    features: str = option(
        f"Features of linear attention: {' or '.join(FEATURES)}.", "softmax", choices=FEATURES
    )
    dtype: str = option(f"Inputs: {', '.join(DTYPES)}.", "float32", choices=DTYPES)
    device: str = "cpu"
    seed: int = option(**SEED)


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(Workload, SweptSampling):
    """Settings of ``performers benchmark attention``."""

    lengths: tuple[int, ...] = _extent(default=(512, 1024, 2048, 4096, 8192, 16384), **LENGTHS)
    device: str = option("Device of the calls: cpu, or a GPU as cuda or cuda:1.", "cpu")
    contestants: tuple[str, ...] = _extent(
        "Names with commas between: performers native, performers triton, performers torch, SDPA, "
        "SDPA flash, SDPA cuDNN, identity, performer-pytorch, fast-transformers, fla; all that "
        "run on the device by default.",
        (),
    )
    directions: tuple[str, ...] = _extent(
        f"{', '.join(DIRECTIONS)} or both.", DIRECTIONS, choices=DIRECTIONS
    )
    passes: tuple[str, ...] = _extent(f"{', '.join(PASSES)} or both.", PASSES, choices=PASSES)
    between_matmuls: bool = option(
        "Time calls between matrix products of a model's size; subtract these.", False
    )

    def __post_init__(self) -> None:
        """Check ranges, and that a contestant can run.

        Raises:
            OptionError: An option is out of range or unknown, or no contestant can run.
        """
        super().__post_init__()
        _check_device(self.device)
        if self.contestants:
            from performers.benchmark.cases.contestants import contestants

            known = contestants(self.device)
            Declaration(help="", choices=tuple(known)).check("--contestants", self.contestants)
            if all(known[name].absence for name in self.contestants):
                reasons = ", ".join(f"{name}: {known[name].absence}" for name in self.contestants)
                raise OptionError(f"--contestants has none that can run here ({reasons})")


def _check_device(name: str) -> None:
    """Check that calls can be timed on a device.

    Raises:
        OptionError: It is neither the processor nor a CUDA device that is available.
    """
    import torch

    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise OptionError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise OptionError(
            f"--device {name} is not available: torch sees {count} CUDA devices here; use --device "
            "cpu, or a build of torch for the GPU"
        )


@dataclass(frozen=True, kw_only=True)
class Shape(Options):
    """A model of the paper and its input, except length and attention."""

    size: str = option(
        f"Size of the paper's timing models: {' or '.join(SIZES)}.", "regular", choices=tuple(SIZES)
    )
    objective: str = option(
        f"{OBJECTIVES[0]}: causal; {OBJECTIVES[1]}: masked tokens.", "clm", choices=OBJECTIVES
    )
    batch: int = option("Sequences in a call.", 1, at_least=1)
    num_features: int | None = option("Random features per head; 256 by default.", None, at_least=1)
    dropout: float = option("Dropout probability.", 0.1, at_least=0, below=1)
    seed: int = option(**SEED)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Shape, SweptSampling):
    """Settings of ``performers benchmark model``."""

    lengths: tuple[int, ...] = _extent(default=(512, 1024, 2048, 4096, 8192), **LENGTHS)
    attentions: tuple[str, ...] = _extent(
        f"Some of {', '.join(MODEL_ATTENTIONS)}, with commas between.",
        MODEL_ATTENTIONS,
        choices=MODEL_ATTENTIONS,
    )
    repeats: int = option(default=5, **REPEATS)


@dataclass(frozen=True, kw_only=True)
class DecodeSettings(Workload, Rounds):
    """Settings of ``performers benchmark decode``."""

    contexts: tuple[int, ...] = _extent(
        "Tokens read before, rising, with commas between.",
        (1024, 4096, 16384, 65536, 131072),
        rising=True,
    )
    tokens: int = option("Tokens stepped through in a call.", 16, at_least=1)
    through_model: bool = option("Also decode with the paper's regular model.", False)
