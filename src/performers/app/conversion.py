"""Options of ``performers convert``, where the command line reads them without torch."""

from __future__ import annotations

from dataclasses import dataclass

from performers.app.options import ESTIMATORS, Estimator, OptionError, Options, argument, option

# Spelt here so that the command line starts without torch; a test compares them with those of
# `performers.distill`.
LOSSES = ("logits", "hidden", "embedding", "task")


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(Options):
    """Options of a run; each is a flag of ``performers convert``."""

    model: str = argument(
        "Folder of a pretrained model of transformers or sentence-transformers, its name on the "
        "Hugging Face Hub, or a .gguf file.",
        path=True,
    )
    data: str = option("Text or FASTA file; its end is held out for testing.", path=True)
    window: int | None = option(
        "Pairs this close are exact; 0: features for all pairs.", 64, at_least=0
    )
    sinks: int | None = option(
        "First keys that are exact; 4 for decoders, else 0.", None, at_least=0
    )
    listed_keys: int = option(
        "Keys per query, chosen by content, that are exact; encoders only.", 0, at_least=0
    )
    num_features: int | None = option(
        "Random features per head; about d ln d by default.", None, at_least=1
    )
    estimator: Estimator = option(
        f"One of {', '.join(ESTIMATORS)}.", "data_aware", choices=ESTIMATORS
    )
    layers: tuple[int, ...] | None = option(
        "Attention layers that become linear, with commas between, negative ones from the end; "
        "the others stay exact. All by default.",
        None,
    )
    length: int | None = option(
        "Tokens in an example; 1,024 for decoders, else 512, by default. A table of learned "
        "positions is extended to them.",
        None,
        at_least=3,
    )
    calibration: int = option("Examples that features are fitted to.", 16, at_least=1)
    test: int | float = option("Examples to test on; with a point, their share of the file.", 32)
    transfer_steps: int | None = option(
        "Steps of attention transfer before; 100 by default, 0 leaves it out.", None, at_least=0
    )
    steps: int = option("Steps of fine-tuning the whole model; 0 leaves it out.", 200, at_least=0)
    batch_size: int = option("Examples in a batch.", 4, at_least=1)
    accumulation: int = option("Batches per optimiser step.", 1, at_least=1)
    learning_rate: float = option("Peak learning rate of fine-tuning.", 5e-5, at_least=0)
    transfer_learning_rate: float = option(
        "Initial learning rate of attention transfer.", 1e-2, at_least=0
    )
    lora_rank: int | None = option(
        "Train adapters of this rank instead of all weights.", None, at_least=1
    )
    redraw_steps: int | None = option(
        "Steps between redraws of features that are not trained.", None, at_least=1
    )
    loss: str | None = option(
        "logits, hidden, embedding or task; logits by default, embedding for a model without a "
        "head.",
        None,
        choices=LOSSES,
    )
    hidden_weight: float = option(
        "Weight of the hidden states' error, beside that of logits or embeddings.",
        1.0,
        at_least=0,
    )
    eval_steps: int | None = option(
        "Steps between measurements; a fifth by default.", None, at_least=1
    )
    save_steps: int = option("Steps between checkpoints.", 50, at_least=1)
    max_positions: int | None = option(
        "Extend a table of learned positions further than to --length.", None, at_least=1
    )
    seed: int = option("Random seed.", 0, at_least=0, below=2**32)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: An option is out of range; the message begins with its flag.
        """
        super().__post_init__()
        if self.window == 0:
            object.__setattr__(self, "window", None)
        if self.listed_keys and self.estimator == "trigonometric":
            raise OptionError(
                "--listed-keys needs positive features, whose estimates can be taken out of a sum; "
                "got --estimator trigonometric"
            )
