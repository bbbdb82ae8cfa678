"""Options of a training run, and the names that they choose from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from performers.app.options import Declaration, OptionError, Options, option
from performers.app.processes import local_share

if TYPE_CHECKING:
    from performers.models import PerformerConfig

# The names are spelt here so that the command line starts without torch; a test compares them with
# those of `performers.models`.
ATTENTIONS = (
    *("favor-softmax", "favor-relu", "favor-elu+1", "favor-exp", "favor-sigmoid", "favor-gelu"),
    *("favor-cos", "favor-tanh", "favor-abs", "favor-identity", "exact", "identity"),
)
ESTIMATORS = ("positive", "hyperbolic", "trigonometric")
"""Estimators that are not calibrated on a trained model."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Options of ``train_model``; each is a flag of ``performers train``.

    The optimiser's defaults are the paper's (Choromanski et al. 2021, appendix B.2): AdamW with
    betas 0.9 and 0.98, epsilon 1e-9, weight decay 0.1, gradients clipped at 0.5.
    """

    objective: str = option(
        "mlm: predict masked residues; clm: predict the next residue.",
        "mlm",
        choices=("mlm", "clm"),
        group="Model",
    )
    attention: str = option(
        f"One of {', '.join(ATTENTIONS)}.",
        "favor-softmax",
        config="attention",
    )
    attention_options: dict[str, Any] | None = None
    hidden_size: int = option("Width of the model.", 256, at_least=1, config="hidden_size")
    num_layers: int = option(
        "Transformer blocks.", 4, flag="--layers", at_least=1, config="num_hidden_layers"
    )
    num_heads: int = option(
        "Attention heads.", 8, flag="--heads", at_least=1, config="num_attention_heads"
    )
    intermediate_size: int | None = option(
        "Feed-forward width; four times the model's by default.",
        None,
        at_least=1,
        config="intermediate_size",
    )
    num_features: int | None = option(
        "Random features per head; about d ln d by default.",
        None,
        at_least=1,
        config="num_features",
    )
    estimator: str = option(
        f"Softmax estimator: {', '.join(ESTIMATORS)}.",
        "positive",
        choices=ESTIMATORS,
        config="estimator",
        needs={"attention": "favor-softmax"},
    )
    window: int | None = option(
        "Tokens seen exactly to each side (favor-softmax).",
        None,
        at_least=0,
        config="window",
        keeps_weights=True,
        needs={"attention": "favor-softmax"},
    )
    position_window: int | None = option(
        "Positions seen exactly to each side, in all members of a row of --families, by half of "
        "the heads (favor-softmax, mlm).",
        None,
        at_least=0,
        config="position_window",
        keeps_weights=True,
        needs={"attention": "favor-softmax", "objective": "mlm"},
        excludes=("sequence_parallel",),
    )
    position_embedding: str = option(
        "rotary, sinusoidal or learned.",
        "rotary",
        flag="--positions",
        choices=("rotary", "sinusoidal", "learned"),
        config="position_embedding",
    )
    dropout: float = option(
        "Dropout probability.",
        0.1,
        at_least=0,
        at_most=0.99,
        config="hidden_dropout_prob",
        keeps_weights=True,
    )
    max_length: int = option(
        "Longest row in tokens; longer sequences are split.",
        1024,
        at_least=3,
        config="max_position_embeddings",
        keeps_weights=True,
        group="Batches",
    )
    packed: bool = option("Fill rows of --max-length with several sequences.", False)
    across_sequences: bool = option(
        "In packed rows, attend across sequences.", False, needs={"packed": ""}
    )
    families: str | None = option(
        "Rows of proteins with relatives (those of a corpus, or family=NAME in FASTA headers), "
        "which read each other; residues to predict are in all of them, or in one (all, one).",
        None,
        choices=("all", "one"),
        excludes=("packed",),
    )
    alone: float = option(
        "Share of the proteins that --families reads without relatives.",
        0.25,
        at_least=0,
        at_most=1,
        needs={"families": ""},
    )
    family_power: float = option(
        "Power of the size of its family by which a protein is read more often: 0 reads proteins "
        "evenly, -1 families, and more than 0 favours large ones (families as for --families).",
        0.0,
        at_least=-2,
        at_most=2,
        excludes=("packed",),
    )
    batch_tokens: int = option(
        "Tokens in a batch on each process, padding included.", 8192, at_least=1
    )
    accumulation: int = option("Batches per optimiser step.", 1, at_least=1)
    steps: int = option("Optimiser steps.", 1000, at_least=1, group="Optimisation")
    time_limit: float | None = option(
        "Processor seconds of training steps after which the run ends and the learning rate is "
        "zero.",
        None,
        above=0,
    )
    carry_state: bool = option(
        "Hand the state of a text's segment on to the next one (texts).",
        False,
        needs={"objective": "clm"},
        excludes=("gradient_checkpointing", "reversible", "sequence_parallel", "fsdp"),
        group="Batches",
    )
    memory: int | None = option(
        "Keys before a segment that exact attention sees with --carry-state (texts).",
        None,
        at_least=1,
        needs={"carry_state": "", "attention": "exact"},
        group="Batches",
    )
    optimizer: str = option("adamw, or muon for the matrices.", "adamw", choices=("adamw", "muon"))
    learning_rate: float = option(
        "Peak learning rate; rises over --warmup-steps, then falls linearly to zero.",
        1e-3,
        at_least=0,
    )
    warmup_steps: int | None = option(
        "Steps of linear warm-up; a twentieth of --steps by default.", None, at_least=0
    )
    weight_decay: float = option("Weight decay of matrices and embeddings.", 0.1, at_least=0)
    max_grad_norm: float = option("Norm at which gradients are clipped.", 0.5, at_least=0)
    mask_probability: float = option(
        "Share of residues to predict (mlm).",
        0.15,
        at_least=1e-6,
        at_most=1,
        needs={"objective": "mlm"},
    )
    redraw_steps: int = option(
        "Steps between fresh random features; 0 keeps the first.", 1000, at_least=0
    )
    seed: int = option(
        "Random seed of weights, data order, masks and features.", 0, at_least=0, below=2**32
    )
    device: str = option(
        "cpu, cuda or another kind of device of torch; auto takes an accelerator where there is "
        "one.",
        "auto",
        changes_result=False,
        group="Device and memory",
    )
    dtype: str | None = option(
        "float32, the default, or bfloat16 for mixed precision.",
        None,
        choices=("float32", "bfloat16"),
    )
    bf16: bool = option("The same as --dtype bfloat16.", False)
    gradient_checkpointing: bool = option(
        "Recompute activations in the backward pass: less memory, more time.", False
    )
    reversible: bool = option(
        "Reversible blocks, whose activation memory does not grow with --layers.",
        False,
        config="reversible",
        excludes=("gradient_checkpointing",),
    )
    sequence_parallel: int = option(
        "Processes of torchrun that share each row (favor attention); includes --fsdp.",
        1,
        at_least=1,
        needs={"attention": "favor-*"},
    )
    fsdp: bool = option(
        "Weights and optimiser state sharded over the processes of torchrun (FSDP2).", False
    )
    feed_forward_chunk: int = option(
        "Tokens in feed-forward blocks at a time; 0 for all.",
        0,
        at_least=0,
        config="chunk_size_feed_forward",
        keeps_weights=True,
    )
    validation_fraction: float = option(
        "Share of the sequences of FASTA files held out without --validation, at most 500.",
        0.05,
        at_least=0,
        at_most=0.9,
        group="Validation and logs",
    )
    log_steps: int = option("Steps between log entries.", 10, at_least=1, changes_result=False)
    eval_steps: int | None = option(
        "Steps between validations; a tenth of --steps, and of --time-limit, by default.",
        None,
        at_least=1,
        changes_result=False,
    )
    save_steps: int | None = option(
        "Steps between checkpoints; a tenth of --steps, and of --time-limit, by default.",
        None,
        at_least=1,
        changes_result=False,
    )
    report_to: tuple[str, ...] | None = option(
        "Trackers to log to: tensorboard (into --output), wandb; with a comma between.",
        None,
        choices=("tensorboard", "wandb"),
        changes_result=False,
    )

    def __post_init__(self) -> None:
        """Check ranges, combinations of options and the memory of the model.

        Raises:
            UserError: An option is out of range, two do not go together, or the model cannot be
                trained in the memory of this machine; the message names the flag.
        """
        super().__post_init__()
        if self.bf16 and self.dtype == "float32":
            raise OptionError("--bf16 is --dtype bfloat16; leave out --bf16 or --dtype float32")
        # One setting with two names, of which the older is recorded.
        object.__setattr__(self, "bf16", self.bf16 or self.dtype == "bfloat16")
        object.__setattr__(self, "dtype", None)
        if self.attention not in ATTENTIONS:
            # A program may have registered others.
            from performers.models.registry import ATTENTIONS as REGISTERED

            Declaration(help="", choices=tuple(REGISTERED)).check("--attention", self.attention)
        if self.steps * self.accumulation >= 2**63:
            raise OptionError(
                f"--steps times --accumulation must be below 2^63 batches, got {self.steps} and "
                f"{self.accumulation}"
            )
        if self.hidden_size % self.num_heads:
            raise OptionError(
                f"--hidden-size must be a multiple of --heads, got {self.hidden_size} and "
                f"{self.num_heads}"
            )
        if self.position_embedding == "rotary" and self.hidden_size // self.num_heads % 2:
            raise OptionError(
                "--positions rotary needs an even --hidden-size / --heads, got "
                f"{self.hidden_size} / {self.num_heads}"
            )
        odd = self.num_features is not None and self.num_features % 2
        if odd and self.attention == "favor-softmax" and self.estimator != "positive":
            raise OptionError(
                f"--num-features must be a positive even number for --estimator {self.estimator}, "
                f"got {self.num_features}"
            )
        if self.batch_tokens < self.max_length:
            raise OptionError(
                f"--batch-tokens ({self.batch_tokens}) must be at least --max-length "
                f"({self.max_length})"
            )
        if self.sharded and self.optimizer == "muon":
            raise OptionError(
                "--optimizer muon needs whole matrices, and --fsdp or --sequence-parallel shards "
                "them: use --optimizer adamw"
            )
        if self.position_window is not None and self.num_heads < 2:
            raise OptionError(f"--position-window needs two --heads or more, got {self.num_heads}")
        if self.carry_state and self.attention == "exact" and self.memory is None:
            raise OptionError(
                "--carry-state with --attention exact needs --memory, the number of keys to keep"
            )
        if self.carry_state and self.position_embedding == "learned":
            raise OptionError(
                "--carry-state has no last position, learned ones do: use --positions rotary"
            )
        self._check_memory()

    @property
    def needs_families(self) -> bool:
        """Use of the family of each protein."""
        return self.families is not None or self.family_power != 0

    @property
    def sharded(self) -> bool:
        """Sharing of the weights by processes."""
        return self.fsdp or self.sequence_parallel > 1

    def model_config(self, tokenizer: Any) -> PerformerConfig:
        """The configuration of the model to train, for a tokenizer."""
        return self._config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    def check_memory(self, tokens: int) -> None:
        """Check that activations fit in memory beside the model; ``tokens`` are those of the data.

        Raises:
            UserError: The activations do not fit in memory.
        """
        if not (self.gradient_checkpointing or self.bf16):
            # A batch ends where one more row would exceed the budget: half of it is always reached.
            trained = int((1 - self.validation_fraction) * tokens)
            batch = min(trained, self.batch_tokens)
            self._check_memory(batch // (2 * self.sequence_parallel))

    def _check_memory(self, tokens: int = 0) -> None:
        from performers.training.memory import check_training_memory

        share = local_share() if self.sharded else 1.0
        check_training_memory(self._config(), self.optimizer, tokens, share)

    def _config(self, **tokens: Any) -> PerformerConfig:
        from performers.models import PerformerConfig

        chosen: dict[str, Any] = {"attention_options": dict(self.attention_options or {})}
        if self.memory is not None:
            chosen["attention_options"]["memory"] = self.memory
        chosen |= {
            item.metadata["option"].config: getattr(self, item.name)
            for item in fields(self)
            if "option" in item.metadata
            and item.metadata["option"].config
            and getattr(self, item.name) is not None
        }
        chosen.setdefault("intermediate_size", 4 * self.hidden_size)
        return PerformerConfig(**chosen, is_decoder=self.objective == "clm", **tokens)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data."""
        return asdict(self)

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Differences from the options of an earlier run, of those that change the result.

        An option that the earlier run does not mention is newer than it, and was at its default.
        """
        defaults = {item.name: item.default for item in fields(self)}
        before = {name: earlier.get(name, defaults[name]) for name in self.decisive()}
        now = {name: getattr(self, name) for name in before}
        # Recorded as bf16, whichever of the two flags was given.
        for options in (before, now):
            options["dtype"] = "bfloat16" if options.pop("bf16") else "float32"
        return [
            f"{self.flag(name)} was {value}, now {now[name]}"
            for name, value in before.items()
            if now[name] != value
        ]
