"""Quality of a converted model: predictions and embeddings, compared with the original."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from performers.convert.families.base import call_model
from performers.convert.fitting import evaluation

_LM_TABLES = {
    "masked": transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal": transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
# Share of the ordinary tokens of a row that is masked.
_MASKED = 0.15
# Rows of logits, each as wide as the vocabulary, in float64 at a time.
_ROWS = 128
# With fewer passages the nearest other one is trivial.
_RETRIEVAL_PASSAGES = 3


@dataclass(frozen=True)
class Quality:
    """Results of `measure_quality`; None where a figure does not apply to the kind of model.

    Attributes:
        tokens: Number of predicted tokens; for an encoder, of embedded tokens.
        perplexity: ``exp`` of the mean cross-entropy per predicted token.
        accuracy: Share of tokens that are predicted correctly.
        divergence: Mean of ``KL(reference || model)`` over predicted tokens, nats; None without a
            reference.
        cosine: Mean over passages of the cosine between the sentence embeddings of the model and
            the reference: means of the last hidden states over tokens that are not padding.
        retrieval: Share of passages whose nearest other passage, by the cosine of embeddings, is
            the same for model and reference; None for fewer than three passages.
    """

    tokens: int
    perplexity: float | None = None
    accuracy: float | None = None
    divergence: float | None = None
    cosine: float | None = None
    retrieval: float | None = None

    def figures(self) -> dict[str, float]:
        """Figures that apply to the kind of model, by name."""
        values = list(asdict(self).items())[1:]
        return {name: value for name, value in values if value is not None}


def kind_of(model: Any) -> str:
    """Tell ``"causal"`` and ``"masked"`` by the head of a model; ``"encoder"`` has none."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder model, for which no quality is defined: measure its "
            "task before and after"
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
    seed: int = 0,
) -> Quality:
    """Measure a model on batches, compared with its original.

    A causal model predicts each token from those before it. A masked model predicts a share of the
    ordinary tokens of each row, which are replaced by the mask token and depend on the batches and
    the seed alone, so that the task is the same for all models. An encoder embeds passages. Sums
    are in float64.

    Args:
        model: A transformers model, converted or not.
        reference: The original; None, or the model itself: no comparison.
        batches: Mappings with ``input_ids`` (B, L), and ``attention_mask`` if there is padding.
        kind: ``"causal"``, ``"masked"`` or ``"encoder"``; None: `kind_of` the model.
        tokenizer: Tokenizer of a masked model.
        seed: Random seed of the masked tokens.
    """
    kind = kind or kind_of(model)
    if kind not in (kinds := (*_LM_TABLES, "encoder")):
        raise ValueError(f"kind must be one of {kinds} or None, got {kind!r}")
    if reference is model:
        reference = None
    with evaluation(model), evaluation(model if reference is None else reference):
        if kind == "encoder":
            return _embedded(model, reference, batches)
        is_causal = kind == "causal"
        tasks = _next_tokens(batches) if is_causal else _masked_tokens(batches, tokenizer, seed)
        return _predicted(model, reference, tasks)


# Inputs, the rows and positions of logits, and the tokens that they predict.
_Task = tuple[Mapping[str, Tensor], Tensor, Tensor, Tensor]


def _next_tokens(batches: Iterable[Mapping[str, Tensor]]) -> Iterator[_Task]:
    for batch in batches:
        ids, mask = _ids_and_mask(batch)
        rows, positions = torch.nonzero(mask[:, :-1] & mask[:, 1:], as_tuple=True)
        yield batch, rows, positions, ids[rows, positions + 1]


def _masked_tokens(
    batches: Iterable[Mapping[str, Tensor]], tokenizer: Any, seed: int
) -> Iterator[_Task]:
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise ValueError(
            "tokenizer must have a mask token to measure a masked language model, got "
            f"{type(tokenizer).__name__}: pass the model's own, or kind='encoder'"
        )
    special = torch.tensor(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        ids, mask = _ids_and_mask(batch)
        masked = torch.zeros_like(mask)
        for row, ordinary in enumerate(mask & ~torch.isin(ids, special)):
            places = torch.nonzero(ordinary)[:, 0]
            number = min(len(places), max(1, round(_MASKED * len(places))))
            masked[row, places[torch.randperm(len(places), generator=generator)[:number]]] = True
        rows, positions = torch.nonzero(masked, as_tuple=True)
        inputs = {**batch, "input_ids": ids.masked_fill(masked, tokenizer.mask_token_id)}
        yield inputs, rows, positions, ids[rows, positions]


def _predicted(model: Any, reference: Any, tasks: Iterable[_Task]) -> Quality:
    loss, divergence, right, tokens = 0.0, 0.0, 0, 0
    for inputs, *places in tasks:
        logits = _run(model, inputs).logits
        expected = None if reference is None else _run(reference, inputs).logits
        tokens += len(places[0])
        for rows, positions, targets in zip(*(x.split(_ROWS) for x in places), strict=True):
            own = F.log_softmax(logits[rows, positions].cpu().double(), dim=-1)
            loss -= float(own.gather(1, targets[:, None]).sum())
            right += int((own.argmax(dim=-1) == targets).sum())
            if expected is not None:
                theirs = F.log_softmax(expected[rows, positions].cpu().double(), dim=-1)
                divergence += float(F.kl_div(own, theirs, log_target=True, reduction="sum"))
    if not tokens:
        raise ValueError(
            "batches have nothing to predict: pass at least one with two ordinary tokens in a row"
        )
    return Quality(
        tokens,
        perplexity=float(torch.tensor(loss / tokens, dtype=torch.float64).exp()),
        accuracy=right / tokens,
        divergence=None if reference is None else divergence / tokens,
    )


def _embedded(model: Any, reference: Any, batches: Iterable[Mapping[str, Tensor]]) -> Quality:
    models = (model,) if reference is None else (model, reference)
    parts: list[list[Tensor]] = [[] for _ in models]
    tokens = 0
    for batch in batches:
        mask = _ids_and_mask(batch)[1]
        tokens += int(mask.sum())
        for each, embeddings in zip(models, parts, strict=True):
            states = _run(each.base_model, batch).last_hidden_state.cpu().double()
            # Padded states may hold anything, NaN included.
            sums = states.masked_fill(~mask[..., None], 0.0).sum(dim=1)
            counts = mask.sum(dim=1, keepdim=True).clamp_min(1)
            embeddings.append(F.normalize(sums / counts, dim=-1))
    if not parts[0]:
        raise ValueError("batches must have at least one batch, got none")
    own, theirs = torch.cat(parts[0]), torch.cat(parts[-1])
    retrieval = None
    if len(own) >= _RETRIEVAL_PASSAGES:
        retrieval = float((_nearest(own) == _nearest(theirs)).double().mean())
    cosine = float((own * theirs).sum(dim=1).mean())
    return Quality(tokens, cosine=cosine, retrieval=retrieval)


def _nearest(embeddings: Tensor) -> Tensor:
    """Index of the nearest other row for each row of unit vectors."""
    nearest = []
    for rows in torch.arange(len(embeddings)).split(_ROWS):
        cosines = embeddings[rows] @ embeddings.T
        cosines[torch.arange(len(rows)), rows] = -math.inf
        nearest.append(cosines.argmax(dim=1))
    return torch.cat(nearest)


def _ids_and_mask(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask")
    return ids, torch.ones_like(ids).bool() if mask is None else mask.cpu() != 0


def _run(model: Any, batch: Mapping[str, Tensor]) -> Any:
    return call_model(model, **{name: x.to(model.device) for name, x in batch.items()})
