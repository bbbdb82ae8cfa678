"""Sizes of a protein study: its models, its runs, its lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from performers.features import FUNCTIONS
from performers.training.options import TrainingOptions
from studies.comparators import COMPARATORS

PERFORMERS = ("favor-relu", "favor-softmax")
MASKED = ("exact", *PERFORMERS, *COMPARATORS, "identity")
CAUSAL = tuple(attention for attention in MASKED if attention != "linformer")
KERNELS = tuple(f"favor-{name}" for name in FUNCTIONS if name != "relu")


@dataclass(frozen=True, kw_only=True)
class StudyPreset:
    """One size of the study.

    Attributes:
        training: Options that all runs of the comparison share.
        seeds: Seeds of the comparison.
        masked: Attentions compared under ``mlm``.
        causal: Attentions compared under ``clm``.
        once: Those of them that are run with the first seed only.
        kernels: Attentions of the ablation, beside ``favor-relu`` of the comparison.
        kernel_seeds: Its seeds.
        window: Window of ``local``, in tokens.
        lsh_chunk_size: See ``LshOptions.chunk_size``.
        lsh_rounds: See ``LshOptions.rounds``.
        scored: Sequences scored of each split.
        long: Options of the run on concatenated proteins; None leaves it out.
        context_lengths: Tokens of the forward passes; empty leaves them out.
        context_exact: Longest at which exact attention is measured.
        learnt: Sequences read for what the models learnt.
    """

    training: TrainingOptions
    seeds: tuple[int, ...] = (0, 1, 2)
    masked: tuple[str, ...] = MASKED
    causal: tuple[str, ...] = CAUSAL
    once: tuple[str, ...] = ()
    kernels: tuple[str, ...] = KERNELS
    kernel_seeds: tuple[int, ...] = (0,)
    window: int = 64
    lsh_chunk_size: int = 32
    lsh_rounds: int = 2
    scored: int = 500
    long: TrainingOptions | None = None
    context_lengths: tuple[int, ...] = ()
    context_exact: int = 32768
    learnt: int = 200

    def options(self, objective: str, attention: str, seed: int) -> TrainingOptions:
        """Training options of one run of the comparison."""
        own: dict[str, Any] = {}
        if attention == "local":
            own = {"attention_options": {"window": self.window}}
        if attention == "lsh":
            sizes = {"chunk_size": self.lsh_chunk_size, "rounds": self.lsh_rounds}
            own = {"attention_options": sizes}
        return replace(self.training, objective=objective, attention=attention, seed=seed, **own)


_MINUTES = TrainingOptions(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_features=32,
    position_embedding="learned",
    max_length=512,
    batch_tokens=1024,
    steps=600,
    learning_rate=4e-3,
    weight_decay=0.05,
    dropout=0.0,
    redraw_steps=0,
    eval_steps=300,
    save_steps=300,
)
_HOURS = TrainingOptions(
    hidden_size=96,
    num_layers=3,
    num_heads=3,
    num_features=64,
    max_length=512,
    batch_tokens=4096,
    steps=700,
    learning_rate=3e-3,
    warmup_steps=70,
    dropout=0.0,
    redraw_steps=0,
    bf16=True,
    eval_steps=700,
    save_steps=200,
)
_CLUSTER = TrainingOptions(
    hidden_size=512,
    num_layers=36,
    num_heads=8,
    intermediate_size=1024,
    num_features=256,
    max_length=1024,
    batch_tokens=16384,
    accumulation=4,
    steps=500_000,
    learning_rate=1e-3,
    warmup_steps=8000,
    redraw_steps=1000,
    bf16=True,
    gradient_checkpointing=True,
    eval_steps=10_000,
    save_steps=1000,
)


def _on_long_rows(training: TrainingOptions, **changes: Any) -> TrainingOptions:
    rows: dict[str, Any] = {"max_length": 8192, "batch_tokens": 8192}
    rows |= {"attention": "favor-relu", "packed": True, "across_sequences": True}
    return replace(training, **rows, **changes)


PRESETS = {
    "minutes": StudyPreset(
        training=_MINUTES,
        long=_on_long_rows(
            _MINUTES,
            position_embedding="rotary",
            steps=60,
            learning_rate=2e-3,
            eval_steps=60,
            save_steps=20,
        ),
        context_lengths=(4096, 16384, 65536),
        context_exact=16384,
        learnt=100,
    ),
    "hours": StudyPreset(
        training=_HOURS,
        long=_on_long_rows(
            _HOURS,
            num_layers=6,
            steps=300,
            warmup_steps=30,
            eval_steps=300,
            save_steps=50,
        ),
        context_lengths=(8192, 32768, 131072, 524288, 1441792),
        context_exact=32768,
        once=("local", "bigbird", "identity"),
        scored=1000,
    ),
    "cluster": StudyPreset(
        training=_CLUSTER,
        window=128,
        lsh_chunk_size=64,
        lsh_rounds=4,
        scored=10**9,
        long=_on_long_rows(_CLUSTER, num_layers=6, steps=100_000),
        context_lengths=(8192, 32768, 131072, 524288, 2097152),
        context_exact=65536,
        learnt=800,
    ),
}
"""``minutes``: small models, for the embedded proteins; ``hours``: a corpus and two cores;
``cluster``: the paper's models (Choromanski et al. 2021, section 4.4: 36 layers, 8 heads, d_ff
1,024, d 512, length 1,024), for a corpus of the size of TrEMBL and several accelerators."""
