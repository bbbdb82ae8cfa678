"""Small models of every kind, and the inputs they are put through."""

import torch
from torch import Tensor

from performers.features import FUNCTIONS
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.models.configuration import POSITIONS

FAVOR = ("favor-softmax", *(f"favor-{name}" for name in FUNCTIONS))
# One of each kind: exponential features, elementwise ones, keys and values, nothing.
MAIN = ("favor-softmax", "favor-relu", "exact", "identity")
# Not the registry, which studies add to.
FULL = (*FAVOR, "exact", "identity")
CAUSAL = CACHED = FULL
EVERY = tuple((name, causal) for causal in (False, True) for name in FULL)
POSITION_NAMES = POSITIONS

VOCABULARY = 31
PAD = 0

# Two ways to the same numbers in float64. Maps of both signs have normalisers near zero, which
# make more of rounding.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}


def make_config(attention: str = "favor-softmax", **options: object) -> PerformerConfig:
    """A configuration of a model that runs in milliseconds."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_dropout_prob": 0.0,
        "max_position_embeddings": 128,
        # Large enough for attention to depart from uniform.
        "initializer_range": 0.2,
        "attention": attention,
    }
    return PerformerConfig(**{**settings, **options})


def masked_model(attention: str = "favor-softmax", *, seed: int = 0, **options: object):
    """A bidirectional language model in float64, in eval mode."""
    torch.manual_seed(seed)
    return PerformerForMaskedLM(make_config(attention, **options)).double().eval()


def causal_model(attention: str = "favor-softmax", *, seed: int = 0, **options: object):
    """A causal language model in float64, in eval mode."""
    torch.manual_seed(seed)
    return PerformerForCausalLM(make_config(attention, **options)).double().eval()


def make_model(attention: str, is_causal: bool, **options: object):
    """A language model of either kind."""
    return (causal_model if is_causal else masked_model)(attention, **options)


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Random ids without special tokens, ``(batch, length)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (batch, length), generator=generator)


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch padded on the left, and its mask."""
    return _padded(rows, left=True)


def right_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch padded on the right, and its mask."""
    return _padded(rows, left=False)


def _padded(rows: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(0, len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return ids, mask


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters, by name, which are then forgotten."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
