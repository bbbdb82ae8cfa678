"""What a training run is asked to do."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch

from performers.features.softmax import CALIBRATED, Estimator
from performers.models import PerformerConfig
from performers.models.attention import build_mechanism
from performers.proteins.errors import UserError
from performers.proteins.memory import check_training_memory

OBJECTIVES = ("mlm", "clm")
OPTIMIZERS = ("adamw", "muon")

# Options that change how a run is watched, not what it computes.
_WATCHING = frozenset({"log_steps", "save_steps", "eval_steps"})
_LSH = ("lsh_chunk_size", "lsh_rounds")
_MODEL_NAMES = re.compile(
    r"^(attention|estimator)\b|\b(hidden_size|num_attention_heads|num_features|position_embedding)\b"
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of ``train_model``; each is a flag of ``performers train``.

    The optimiser's defaults are the paper's (Choromanski et al. 2021, appendix B.2): AdamW with
    betas 0.9 and 0.98, epsilon 1e-9, weight decay 0.1, gradients clipped at 0.5.

    Attributes:
        objective: ``"mlm"`` (15% of residues masked, 80/10/10) or ``"clm"`` (next residue).
        attention: See ``PerformerConfig.attention``.
        hidden_size: Width of the model.
        num_layers: Blocks.
        num_heads: Heads.
        intermediate_size: Width of the feed-forward blocks; four times the model's when None.
        num_features: Random features per head; the feature map's default when None.
        estimator: Softmax estimator.
        window: Tokens at most this far apart attend to each other exactly (``favor-softmax``) or at
            all (``local``, 128 when None).
        lsh_chunk_size: How far a token sees in its bucket under ``lsh``, see ``PerformerConfig``;
            64 when None.
        lsh_rounds: Hashes of ``lsh``, whose buckets are united; 4 when None.
        position_embedding: ``"rotary"``, ``"sinusoidal"`` or ``"learned"``.
        dropout: Dropout probability.
        max_length: Longest row in tokens; longer sequences are split into windows.
        packed: Fill rows of exactly ``max_length`` with consecutive sequences, instead of batching
            sequences of similar length.
        across_sequences: In packed rows, attention crosses the boundaries of sequences.
        batch_tokens: Tokens in a batch on each process, padding included.
        accumulation: Batches per optimiser step.
        steps: Optimiser steps.
        learning_rate: Peak; reached after ``warmup_steps``, then falling linearly to zero.
        warmup_steps: A twentieth of the steps when None.
        optimizer: ``"adamw"``, or ``"muon"`` for the matrices inside the model (AdamW for the
            rest; see ``MuonAdamW``), which takes about the same learning rate.
        weight_decay: Of matrices and embeddings.
        max_grad_norm: Gradients are clipped to this norm.
        mask_probability: Share of residues that are targets under ``"mlm"``.
        redraw_steps: Optimiser steps between fresh random features; 0 keeps the first.
        seed: Of weights, data order, masks and redraws.
        bf16: Mixed precision.
        gradient_checkpointing: Recompute blocks in the backward pass.
        reversible: Reversible residual blocks, see ``PerformerConfig.reversible``.
        feed_forward_chunk: Tokens that feed-forward blocks work on at a time; 0 for all at once.
        validation_fraction: Share of the sequences held out when no validation file is given.
        log_steps: Steps between log entries.
        eval_steps: Steps between validations; a tenth of the steps when None.
        save_steps: Steps between checkpoints; a tenth of the steps when None.
    """

    objective: str = "mlm"
    attention: str = "favor-softmax"
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    intermediate_size: int | None = None
    num_features: int | None = None
    estimator: str = "positive"
    window: int | None = None
    lsh_chunk_size: int | None = None
    lsh_rounds: int | None = None
    position_embedding: str = "rotary"
    dropout: float = 0.1
    max_length: int = 1024
    packed: bool = False
    across_sequences: bool = False
    batch_tokens: int = 8192
    accumulation: int = 1
    steps: int = 1000
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    max_grad_norm: float = 0.5
    mask_probability: float = 0.15
    redraw_steps: int = 1000
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    reversible: bool = False
    feed_forward_chunk: int = 0
    validation_fraction: float = 0.05
    log_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UserError: An option is out of range, or the model cannot be trained in the memory of
                this machine; the message names the flag.
        """
        if self.objective not in OBJECTIVES:
            raise UserError(f"--objective must be one of {OBJECTIVES}, got {self.objective!r}")
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"--optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        if self.estimator in CALIBRATED:
            raise UserError(
                f"--estimator {self.estimator} is fitted to the queries and keys of a trained "
                "model; train with positive, hyperbolic or trigonometric"
            )
        least = {
            "hidden_size": 1,
            "num_layers": 1,
            "num_heads": 1,
            "max_length": 3,
            "batch_tokens": 1,
            "accumulation": 1,
            "steps": 1,
            "redraw_steps": 0,
            "seed": 0,
            "log_steps": 1,
            "intermediate_size": 1,
            "num_features": 1,
            "eval_steps": 1,
            "save_steps": 1,
            "warmup_steps": 0,
            "window": 0,
            "feed_forward_chunk": 0,
            "lsh_chunk_size": 1,
            "lsh_rounds": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{flag(name)} must be at least {low}, got {value}")
        for name, lowest, highest in (
            ("dropout", 0.0, 0.99),
            ("mask_probability", 1e-6, 1.0),
            ("validation_fraction", 0.0, 0.9),
        ):
            value = getattr(self, name)
            if not lowest <= value <= highest:
                raise UserError(
                    f"{flag(name)} must be between {lowest:g} and {highest:g}, got {value}"
                )
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{flag(name)} must be at least 0, got {getattr(self, name)}")
        if self.steps * self.accumulation >= 2**63:
            raise UserError(
                f"--steps times --accumulation must be below 2^63 batches, got {self.steps} and "
                f"{self.accumulation}"
            )
        if self.seed >= 2**32:
            raise UserError(f"--seed must be below 2^32, got {self.seed}")
        if self.batch_tokens < self.max_length:
            raise UserError(
                f"--batch-tokens ({self.batch_tokens}) must be at least --max-length "
                f"({self.max_length})"
            )
        if self.across_sequences and not self.packed:
            raise UserError("--across-sequences needs --packed")
        if self.reversible and self.gradient_checkpointing:
            raise UserError(
                "--reversible cannot be combined with --gradient-checkpointing: reversible blocks "
                "keep no activations anyway"
            )
        if self.window is not None and self.attention not in ("favor-softmax", "local"):
            raise UserError(
                "--window needs --attention favor-softmax or local, got --attention "
                f"{self.attention}"
            )
        for name in _LSH:
            if getattr(self, name) is not None and self.attention != "lsh":
                raise UserError(
                    f"{flag(name)} needs --attention lsh, got --attention {self.attention}"
                )
        if self.attention == "linformer" and self.objective == "clm":
            raise UserError(
                "--attention linformer has no causal form: use --objective mlm, or another "
                "attention"
            )
        if self.attention == "linformer" and self.packed and not self.across_sequences:
            raise UserError(
                "--attention linformer cannot keep the sequences of a row apart: leave out "
                "--packed, or add --across-sequences"
            )
        try:
            config = self._config()
            check_training_memory(config, self.optimizer)
            with torch.random.fork_rng(devices=[]):
                build_mechanism(config)
        except ValueError as error:
            raise UserError(_MODEL_NAMES.sub(_model_flag, str(error))) from error

    def model_config(self, tokenizer: Any) -> PerformerConfig:
        """The configuration of the model to train, for a tokenizer."""
        return self._config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    def check_memory(self, tokens: int) -> None:
        """Check that a batch's activations fit in memory beside the model.

        Args:
            tokens: Tokens of the data, from which validation is held out.

        Raises:
            UserError: They do not fit.
        """
        if self.gradient_checkpointing or self.bf16:
            return
        # A batch ends where one more row would exceed the budget: half of it is always reached.
        batch = min(int((1 - self.validation_fraction) * tokens), self.batch_tokens) // 2
        check_training_memory(self._config(), self.optimizer, batch)

    def _config(self, **tokens: Any) -> PerformerConfig:
        return PerformerConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            intermediate_size=self.intermediate_size or 4 * self.hidden_size,
            hidden_dropout_prob=self.dropout,
            position_embedding=self.position_embedding,
            max_position_embeddings=self.max_length,
            attention=self.attention,
            num_features=self.num_features,
            estimator=cast(Estimator, self.estimator),
            window=self.window,
            reversible=self.reversible,
            chunk_size_feed_forward=self.feed_forward_chunk,
            is_decoder=self.objective == "clm",
            **{name: getattr(self, name) for name in _LSH if getattr(self, name) is not None},
            **tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data."""
        return asdict(self)

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Which results-changing options differ from those of an earlier run, in words.

        An option that the earlier run does not mention is newer than it, and was at its default.
        """
        before = {field.name: earlier.get(field.name, field.default) for field in fields(self)}
        return [
            f"{flag(name)} was {value}, now {getattr(self, name)}"
            for name, value in before.items()
            if name not in _WATCHING and getattr(self, name) != value
        ]


def flag(name: str) -> str:
    """The command-line flag of an option."""
    renamed = {
        "num_layers": "layers",
        "num_heads": "heads",
        "position_embedding": "positions",
    }
    return "--" + renamed.get(name, name).replace("_", "-")


def _model_flag(name: re.Match[str]) -> str:
    """The flag of an option that the model knows by another name."""
    return flag(name[0].replace("num_attention_heads", "num_heads"))
