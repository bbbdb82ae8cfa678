"""Options of corpora and sampling, and the names that options choose from."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase

from performers.app.options import OptionError, Options, option

DEMO_STEPS = 2400

UNIPROT = (
    "https://ftp.uniprot.org/pub/databases/uniprot/current_release/knowledgebase/complete/"
    "uniprot_sprot.fasta.gz"
)

POOLINGS = ("mean", "mean-sd")
"""Ways from a sequence's hidden states to one vector: their mean, or that and their spread."""

VECTOR_SUFFIXES = (".npz", ".parquet", ".h5", ".tsv")
"""Formats of files of embeddings."""

SCORE_METHODS = ("masked", "one-pass")
"""Ways to score a residue with a masked model: hidden, by itself, or in sight."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Types that a model computes in."""

COLDEST, HOTTEST = 1e-3, 1e3
"""Temperatures beyond which scaled logits are not finite or no longer differ."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions(Options):
    """Options that decide the splits of a corpus; recorded in its manifest."""

    validation_fraction: float = option(
        "Share of the sequences to validate on.", 0.005, above=0, below=1
    )
    test_fraction: float = option("Share of the sequences to test on.", 0.01, above=0, below=1)
    ood_fraction: float = option(
        "Share of the sequences held out as whole clusters without relatives in the rest.",
        1e-4,
        above=0,
        below=1,
    )
    sensitivity: float = option(
        "Sensitivity of the search for relatives of clusters to hold out (mmseqs2's -s).",
        5.7,
        at_least=1,
        at_most=7.5,
    )
    max_evalue: float = option("Largest e-value of a relative.", 1e-3, above=0)
    min_length: int = option("Least length of a sequence.", 1, at_least=1)
    seed: int = option("Random seed.", 0)
    shard_tokens: int = option("Tokens in a file of tokens.", 1 << 25, at_least=1)

    def __post_init__(self) -> None:
        """Check ranges, and that something is left to train on."""
        super().__post_init__()
        if self.validation_fraction + self.test_fraction + self.ood_fraction > 0.9:
            raise OptionError(
                "--validation-fraction, --test-fraction and --ood-fraction leave less than a "
                "tenth to train on; lower them"
            )


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(SplitOptions):
    """Options of a corpus that is clustered as it is made."""

    ood_fraction: float = option(
        "Share of the sequences held out as whole clusters.", 0.01, above=0, below=1
    )
    identity: float = option("Least identity within a cluster.", 0.3, above=0, at_most=1)
    coverage: float = option(
        "Least coverage of both sequences within a cluster.", 0.8, above=0, at_most=1
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """Options of ``generate_sequences``; each is a flag of ``performers generate``."""

    prompt: str = option("First residues of every sequence.", "")
    num_sequences: int = option("Number of sequences.", 1, flag="--num", at_least=1)
    max_length: int = option("Most residues in a sequence, prompt included.", 512)
    temperature: float = option("Divides the logits; 0 takes the most likely residue.", 1.0)
    top_k: int = option("Sample from so many most likely residues; 0 for all.", 0, at_least=0)
    top_p: float = option(
        "Sample from the smallest set of residues with this probability.", 1.0, above=0, at_most=1
    )
    seed: int = option("Random seed.", 0, at_least=0, below=2**32)

    def __post_init__(self) -> None:
        """Check ranges and the letters of the prompt."""
        super().__post_init__()
        prompt = "".join(self.prompt.split()).upper()
        object.__setattr__(self, "prompt", prompt)
        illegal = sorted(set(prompt) - set(ascii_uppercase))
        if illegal:
            raise OptionError(
                f"--prompt has letters that are not residues: {' '.join(illegal)}; use letters "
                "from A to Z"
            )
        if self.max_length <= len(prompt):
            raise OptionError(
                f"--max-length must exceed the prompt's {len(prompt)} residues, got "
                f"{self.max_length}"
            )
        if self.temperature != 0 and not COLDEST <= self.temperature <= HOTTEST:
            raise OptionError(
                f"--temperature must be 0 or between {COLDEST:g} and {HOTTEST:g}, got "
                f"{self.temperature}"
            )
