"""Performer models as ordinary transformers classes, registered with its Auto classes."""

import re

try:
    import transformers

    if tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:3]) < (5, 10, 1):
        raise ImportError(f"transformers {transformers.__version__} is installed")
except ImportError as error:
    raise ImportError(
        "performers.models needs transformers >= 5.10.1; install it with "
        f"pip install 'performers[models]' ({error})"
    ) from error

from performers.models.cache import PerformerCache
from performers.models.configuration import PerformerConfig
from performers.models.context import AttentionContext
from performers.models.heads import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
)
from performers.models.modeling import PerformerModel, PerformerPreTrainedModel
from performers.models.registry import register_attention

transformers.AutoConfig.register("performer", PerformerConfig, exist_ok=True)
for _auto, _model in (
    (transformers.AutoModel, PerformerModel),
    (transformers.AutoModelForMaskedLM, PerformerForMaskedLM),
    (transformers.AutoModelForCausalLM, PerformerForCausalLM),
    (transformers.AutoModelForSequenceClassification, PerformerForSequenceClassification),
    (transformers.AutoModelForTokenClassification, PerformerForTokenClassification),
    (transformers.AutoModelForQuestionAnswering, PerformerForQuestionAnswering),
):
    _auto.register(PerformerConfig, _model, exist_ok=True)

__all__ = [
    "AttentionContext",
    "PerformerCache",
    "PerformerConfig",
    "PerformerForCausalLM",
    "PerformerForMaskedLM",
    "PerformerForQuestionAnswering",
    "PerformerForSequenceClassification",
    "PerformerForTokenClassification",
    "PerformerModel",
    "PerformerPreTrainedModel",
    "register_attention",
]
