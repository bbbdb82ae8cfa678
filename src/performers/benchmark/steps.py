"""One training step of one of the paper's timing models."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from performers import use_backend
from performers.benchmark.checking import judge
from performers.benchmark.settings import SIZES, ShapeSettings

if TYPE_CHECKING:
    from performers.models import PerformerForCausalLM, PerformerForMaskedLM

VOCABULARY = 256
_MASKED = 0.15
_IGNORED = -100
_CHECKED_LENGTH = 100
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Shape(ShapeSettings):
    """A model and its input, all but the length and the attention."""

    def model(self, attention: str) -> "PerformerForCausalLM | PerformerForMaskedLM":
        """The model in training mode, with the same weights for the same seed and attention."""
        from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM

        heads, layers, intermediate, hidden = SIZES[self.size]
        torch.manual_seed(self.seed)
        config = PerformerConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            hidden_dropout_prob=self.dropout,
            attention=attention,
            num_features=self.num_features,
            is_decoder=self.objective == "clm",
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        kind = PerformerForCausalLM if self.objective == "clm" else PerformerForMaskedLM
        return kind(config).train()

    def tokens(self, length: int) -> tuple[Tensor, Tensor]:
        """Random input tokens and labels, each ``(batch, length)``."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(VOCABULARY, (self.batch, length), generator=generator)
        if self.objective == "clm":
            return tokens, tokens
        chosen = torch.rand(tokens.shape, generator=generator) < _MASKED
        chosen[:, 0] = True
        return tokens, torch.where(chosen, tokens, _IGNORED)


class TrainingStep:
    """Forward, loss, backward and an Adam step of one model, on the same batch every time.

    Args:
        shape: The model.
        attention: See ``PerformerConfig.attention``.
        length: Tokens in a sequence.
    """

    def __init__(self, shape: Shape, attention: str, length: int) -> None:
        self._model = shape.model(attention)
        self._tokens, self._labels = shape.tokens(length)
        # The paper's settings; its weight decay is left out, which costs next to nothing.
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9
        )

    def __call__(self) -> float:
        """Make a step; returns the loss before it.

        Raises:
            ArithmeticError: The loss is not finite.
        """
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._model(input_ids=self._tokens, labels=self._labels).loss
        loss.backward()
        self._optimizer.step()
        value = float(loss.detach())
        if not abs(value) < float("inf"):
            raise ArithmeticError(f"the loss is {value}")
        return value


def check_model(shape: Shape, attention: str) -> None:
    """Compare a model's logits and gradients with those through ``backend="reference"``.

    Attention that has no backends, exact and identity, is not ours to check.

    Args:
        shape: The model.
        attention: See ``PerformerConfig.attention``.

    Raises:
        WrongResultError: They differ.
    """
    if not attention.startswith("favor-"):
        return
    model = shape.model(attention).eval()
    tokens, labels = shape.tokens(_CHECKED_LENGTH)

    def run() -> tuple[Tensor, Tensor]:
        output = model(input_ids=tokens, labels=labels)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        return output.logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    results = run()
    with use_backend("reference"):
        expected = run()
    for part, result, right in zip(("logits", "gradients"), results, expected, strict=True):
        judge(part, result, right, tuple(right.shape), _TOLERANCE)
