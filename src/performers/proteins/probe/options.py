"""Options of probes, and the features that they compare."""

from __future__ import annotations

from dataclasses import dataclass, field

from performers.app.options import Options, option

PROBE_FEATURES = ("embeddings", "random-weights", "composition", "dipeptides", "tripeptides")
"""Features that a probe compares, the model's own first; see `probe_features`."""

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Values that C is chosen from, the inverse strength of the L2 penalty in scikit-learn's terms.

Wide enough for hundreds of standardised columns, which want strong penalties, and for sparse rows
of unit norm, which want weak ones.
"""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(Options):
    """Options of the fits of probes.

    Attributes:
        test: Share of the proteins to test on.
        validation: Share of the proteins to choose the penalty on.
        strengths: Values that C is chosen from, one or more above 0.
    """

    split: str = option(
        "groups: no group is both trained and tested on; random: relatives of the test sequences "
        "are trained on.",
        "groups",
        choices=("groups", "random"),
    )
    repeats: int = option("Number of splits.", 5, at_least=1)
    seed: int = option(
        "Random seed; of the first split, the others follow.", 0, at_least=0, below=2**32
    )
    test: float = field(default=0.2, init=False)
    validation: float = field(default=0.1, init=False)
    min_count: int = option(
        "Labels with or without fewer proteins in a part of a split are dropped.", 50, at_least=1
    )
    strengths: tuple[float, ...] = STRENGTHS
