"""How good a converted model is: what it predicts and how it embeds, beside its original."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from performers.convert.fitting import evaluation

__all__ = ["KINDS", "Quality", "kind_of", "measure_quality"]

KINDS = ("causal", "masked", "encoder")
_LM_TABLES = {
    "masked": transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal": transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
# Rows of logits, each as wide as the vocabulary, that are held in float64 at a time.
_ROWS = 128
# Fewer passages have a nearest one by necessity.
_RETRIEVAL_PASSAGES = 3


@dataclass(frozen=True)
class Quality:
    """What `measure_quality` found; None where a figure does not belong to the kind of model.

    Attributes:
        kind: One of ``KINDS``.
        tokens: Tokens that were predicted; for an encoder, tokens that were embedded.
        perplexity: ``exp`` of the mean cross-entropy a predicted token.
        accuracy: Share of tokens that were predicted right.
        divergence: Mean of ``KL(reference || model)`` over predicted tokens, nats; None without a
            reference.
        cosine: Mean over passages of the cosine between the model's and the reference's sentence
            embeddings, which are means of the last hidden states over the tokens that take part.
        retrieval: Share of passages whose nearest other passage, by the cosine of the model's
            embeddings, is the one that it is by the reference's; None for fewer than three
            passages.
    """

    kind: str
    tokens: int
    perplexity: float | None = None
    accuracy: float | None = None
    divergence: float | None = None
    cosine: float | None = None
    retrieval: float | None = None

    def figures(self) -> dict[str, float]:
        """The figures that this kind of model has."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("kind", "tokens") and value is not None
        }


def kind_of(model: Any) -> str:
    """``"causal"`` or ``"masked"`` for a model with such a head, ``"encoder"`` for one without.

    Raises ValueError for an encoder-decoder model.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model, whose quality is not measured here: measure its "
            "own task before and after"
        )
    for kind, table in _LM_TABLES.items():
        if name in table.values() or name.endswith(f"For{kind.capitalize()}LM"):
            return kind
    return "encoder"


def measure_quality(
    model: Any,
    reference: Any,
    batches: Iterable[Mapping[str, Tensor]],
    kind: str | None = None,
    tokenizer: Any = None,
    *,
    mask_fraction: float = 0.15,
    seed: int = 0,
) -> Quality:
    """Measure a model on batches, beside the model that it was made from.

    A causal model predicts each token that takes part from those before it. From a masked one a
    share of the ordinary tokens of each row is hidden, each replaced by the mask token; which ones
    depends on the batches and the seed alone, so that all models are asked the same. An encoder
    embeds passages. Sums are in float64; of the batches nothing is kept but sums, and embeddings.

    Args:
        model: A transformers model, converted or not.
        reference: The original; None, or the model itself, where there is nothing to compare.
        batches: Mappings with ``input_ids`` (B, L), and ``attention_mask`` where there is padding.
        kind: One of ``KINDS``; None: `kind_of` the model.
        tokenizer: Of the model; for masked ones.
        mask_fraction: Share of a row's ordinary tokens that is hidden, at least one.
        seed: Random seed of the choice of these.
    """
    kind = kind or kind_of(model)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 < mask_fraction <= 1:
        raise ValueError(f"mask_fraction must be in (0, 1], got {mask_fraction}")
    if reference is model:
        reference = None
    with evaluation(model), evaluation(model if reference is None else reference):
        if kind == "encoder":
            return _embedded(model, reference, batches)
        if kind == "causal":
            questions = _next_tokens(batches)
        else:
            questions = _hidden_tokens(batches, tokenizer, mask_fraction, seed)
        return _predicted(model, reference, kind, questions)


@dataclass(frozen=True)
class _Question:
    """Inputs, and the tokens (row, position) whose logits are to predict the targets."""

    inputs: dict[str, Tensor]
    rows: Tensor
    positions: Tensor
    targets: Tensor


def _next_tokens(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[_Question]:
    for batch in batches:
        ids, mask = _ids_and_mask(batch)
        rows, positions = torch.nonzero(mask[:, :-1] & mask[:, 1:], as_tuple=True)
        yield _Question(dict(batch), rows, positions, ids[rows, positions + 1])


def _hidden_tokens(
    batches: Iterable[Mapping[str, Tensor]], tokenizer: Any, fraction: float, seed: int
) -> Iterator[_Question]:
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise ValueError(
            "tokenizer must have a mask token to measure a masked language model, got "
            f"{type(tokenizer).__name__}: pass the model's own, or kind='encoder'"
        )
    special = torch.tensor(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        ids, mask = _ids_and_mask(batch)
        hidden = torch.zeros_like(mask)
        for row, ordinary in enumerate(mask & ~torch.isin(ids, special)):
            places = torch.nonzero(ordinary)[:, 0]
            number = min(len(places), max(1, round(fraction * len(places))))
            hidden[row, places[torch.randperm(len(places), generator=generator)[:number]]] = True
        rows, positions = torch.nonzero(hidden, as_tuple=True)
        inputs = {**batch, "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id)}
        yield _Question(inputs, rows, positions, ids[rows, positions])


def _predicted(model: Any, reference: Any, kind: str, questions: Iterable[_Question]) -> Quality:
    loss, divergence, right, tokens = 0.0, 0.0, 0, 0
    for question in questions:
        logits = _run(model, question.inputs).logits
        wanted = None if reference is None else _run(reference, question.inputs).logits
        tokens += len(question.targets)
        for piece in torch.arange(len(question.targets)).split(_ROWS):
            where = question.rows[piece], question.positions[piece]
            targets = question.targets[piece]
            own = F.log_softmax(logits[where].cpu().double(), dim=-1)
            loss -= float(own.gather(1, targets[:, None]).sum())
            right += int((own.argmax(dim=-1) == targets).sum())
            if wanted is not None:
                theirs = F.log_softmax(wanted[where].cpu().double(), dim=-1)
                divergence += float(F.kl_div(own, theirs, log_target=True, reduction="sum"))
    if not tokens:
        raise ValueError(
            "batches have nothing to predict: pass at least one with two ordinary tokens in a row"
        )
    return Quality(
        kind,
        tokens,
        perplexity=_exponential(loss / tokens),
        accuracy=right / tokens,
        divergence=None if reference is None else divergence / tokens,
    )


def _embedded(model: Any, reference: Any, batches: Iterable[Mapping[str, Tensor]]) -> Quality:
    own: list[Tensor] = []
    theirs: list[Tensor] = []
    tokens = 0
    for batch in batches:
        mask = _ids_and_mask(batch)[1]
        tokens += int(mask.sum())
        own.append(_embeddings(model, batch, mask))
        if reference is not None:
            theirs.append(_embeddings(reference, batch, mask))
    if not own:
        raise ValueError("batches must have at least one batch, got none")
    ours = torch.cat(own)
    right = ours if reference is None else torch.cat(theirs)
    retrieval = None
    if len(ours) >= _RETRIEVAL_PASSAGES:
        retrieval = float((_nearest(ours) == _nearest(right)).double().mean())
    return Quality(
        "encoder", tokens, cosine=float((ours * right).sum(dim=1).mean()), retrieval=retrieval
    )


def _embeddings(model: Any, batch: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Means of the last hidden states over the tokens that take part, of length one; (B, D)."""
    states = _run(model.base_model, batch).last_hidden_state.cpu().double()
    # Padded states may hold anything, NaN included.
    states = states.masked_fill(~mask[..., None], 0.0)
    return F.normalize(states.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1), dim=-1)


def _nearest(embeddings: Tensor) -> Tensor:
    """For each row of unit vectors, the index of the nearest other row."""
    found = []
    for rows in torch.arange(len(embeddings)).split(_ROWS):
        cosines = embeddings[rows] @ embeddings.T
        cosines[torch.arange(len(rows)), rows] = -math.inf
        found.append(cosines.argmax(dim=1))
    return torch.cat(found)


def _ids_and_mask(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask")
    return ids, torch.ones_like(ids).bool() if mask is None else mask.cpu() != 0


def _run(model: Any, batch: Mapping[str, Tensor]) -> Any:
    inputs: dict[str, Any] = {
        name: value.to(model.device) for name, value in batch.items() if name != "labels"
    }
    if getattr(model.config, "use_cache", None):
        inputs["use_cache"] = False
    return model(**inputs)


def _exponential(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
