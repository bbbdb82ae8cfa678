"""Time and memory of training steps of the paper's models against length."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from performers import use_backend
from performers.benchmark.case import Benchmark, Case, Column, Group, Ratio
from performers.benchmark.gate import Gate, judge
from performers.benchmark.memory import Peak, peak_of
from performers.benchmark.settings import SIZES, ModelSettings, Shape
from performers.benchmark.table import nbytes, seconds, times

if TYPE_CHECKING:
    from performers.models import PerformerForCausalLM, PerformerForMaskedLM

VOCABULARY = 256
_MASKED, _IGNORED = 0.15, -100
_CHECKED_LENGTH, _WARM_UP_LENGTH = 100, 64
_TOLERANCE = 1e-3
_GROUP = ("size", "objective", "length")


def make_model(shape: Shape, attention: str) -> PerformerForCausalLM | PerformerForMaskedLM:
    """A model in training mode, with the same weights for the same seed and attention."""
    from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM

    heads, layers, intermediate, hidden = SIZES[shape.size]
    torch.manual_seed(shape.seed)
    config = PerformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        hidden_dropout_prob=shape.dropout,
        attention=attention,
        num_features=shape.num_features,
        is_decoder=shape.objective == "clm",
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    kind = PerformerForCausalLM if shape.objective == "clm" else PerformerForMaskedLM
    return kind(config).train()


def make_tokens(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Random input tokens and labels, each ``(batch, length)``."""
    generator = torch.Generator().manual_seed(shape.seed)
    tokens = torch.randint(VOCABULARY, (shape.batch, length), generator=generator)
    if shape.objective == "clm":
        return tokens, tokens
    chosen = torch.rand(tokens.shape, generator=generator) < _MASKED
    chosen[:, 0] = True
    return tokens, torch.where(chosen, tokens, _IGNORED)


def training_step(shape: Shape, attention: str, length: int) -> Callable[[], float]:
    """Forward, loss, backward and an Adam step of one model, on the same batch in every call.

    A call returns the loss before the step, and raises ArithmeticError where that is not finite.
    """
    model = make_model(shape, attention)
    tokens, labels = make_tokens(shape, length)
    # The paper's settings, without its weight decay, which costs next to nothing.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ArithmeticError(f"the loss is {value}")
        return value

    return step


def check(shape: Shape, attention: str) -> None:
    """Compare a model's logits and gradients with those through ``backend="reference"``.

    Raises:
        WrongResultError: The results differ by more than the tolerance.
    """
    model = make_model(shape, attention).eval()
    tokens, labels = make_tokens(shape, _CHECKED_LENGTH)

    def run() -> tuple[Tensor, Tensor]:
        output = model(input_ids=tokens, labels=labels)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        return output.logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    results = run()
    with use_backend("reference"):
        expected = run()
    for name, result, right in zip(("logits", "gradients"), results, expected, strict=True):
        judge(name, result, right, _TOLERANCE)


def measure_peak(shape: Shape, attention: str, length: int) -> Peak:
    """Peak memory of a model, its optimiser and two steps; runs in a separate process."""
    training_step(shape, attention, _WARM_UP_LENGTH)()

    def two_steps() -> object:
        step = training_step(shape, attention, length)
        # The first makes the optimiser's state, the second has all of it to hold at once.
        step()
        step()
        return step

    return peak_of(two_steps)


def _groups(settings: ModelSettings, notes: dict[str, Any]) -> list[Group]:
    # Exact and identity attention have no backend to check.
    gates = {
        attention: Gate(partial(check, settings, attention))
        for attention in settings.attentions
        if attention.startswith("favor-")
    }
    groups = []
    for length in settings.lengths:
        cases = [
            Case(
                {"attention": attention},
                partial(training_step, settings, attention, length),
                gate=gates.get(attention),
                probe=partial(measure_peak, settings, attention, length),
                ours=True,
                skip=settings.skip_exact(length) if attention == "exact" else None,
                # The linear part of the model dominates at first: an upper bound.
                growth=2 if attention == "exact" else 1,
            )
            for attention in settings.attentions
        ]
        key = {"size": settings.size, "objective": settings.objective, "length": length}
        groups.append(Group(key, cases))
    return groups


MODEL = Benchmark(
    name="model",
    titles=("size", "objective"),
    title="training step, {size} model, {objective}",
    across="length",
    series="attention",
    columns=(
        Column("median", "seconds", seconds),
        Column("this /\nidentity", "over_identity", times),
        Column("exact\n/ this", "exact_ratio", times),
        Column("peak\nmemory", "peak_bytes", nbytes),
        Column("this /\nidentity", "memory_over_identity", times),
    ),
    plotted=(("seconds", "seconds"), ("peak_bytes", "peak memory")),
    ratios=(
        Ratio("over_identity", lambda row: row["attention"] == "identity", _GROUP, over_base=True),
        Ratio(
            "memory_over_identity",
            lambda row: row["attention"] == "identity",
            _GROUP,
            of="peak_bytes",
            over_base=True,
        ),
        Ratio("exact_ratio", lambda row: row["attention"] == "exact", _GROUP),
    ),
    groups=_groups,
)
