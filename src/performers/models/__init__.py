"""Performer models as ordinary transformers classes, registered with its Auto classes."""

import re

_NEEDED = (5, 10, 1)
_ADVICE = (
    f"performers.models needs transformers >= {'.'.join(map(str, _NEEDED))}; install it with "
    "pip install 'performers[models]'"
)
try:
    import transformers
except ImportError as error:
    raise ImportError(_ADVICE) from error
if tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:3]) < _NEEDED:
    raise ImportError(f"{_ADVICE} (found {transformers.__version__})")

from performers.models.cache import PerformerCache
from performers.models.configuration import PerformerConfig
from performers.models.heads import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
)
from performers.models.modeling import PerformerModel, PerformerPreTrainedModel

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
    "PerformerCache",
    "PerformerConfig",
    "PerformerForCausalLM",
    "PerformerForMaskedLM",
    "PerformerForQuestionAnswering",
    "PerformerForSequenceClassification",
    "PerformerForTokenClassification",
    "PerformerModel",
    "PerformerPreTrainedModel",
]
