"""Settings that are refused, with their flag: one of each kind of refusal."""

import math

import pytest

from performers.benchmark.settings import AttentionSettings, DecodeSettings, ModelSettings


@pytest.mark.parametrize(
    ("settings", "changes", "words"),
    [
        (AttentionSettings, {"heads": 0}, "--heads must be at least 1, got 0"),
        (AttentionSettings, {"lengths": (32, 16)}, "--lengths must be positive and rise"),
        (AttentionSettings, {"features": "cos"}, "--features must be one of softmax, relu"),
        (AttentionSettings, {"passes": ("forward", "forward")}, "--passes must name each"),
        (AttentionSettings, {"contestants": ("flash",)}, "--contestants must be one of performers"),
        (AttentionSettings, {"contestants": ("fla",)}, r"has none that can run here \(fla: "),
        (AttentionSettings, {"device": "gpu"}, "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        (
            AttentionSettings,
            {"device": "cuda:64"},
            r"cuda:64 is not available: torch sees \d+ CUDA",
        ),
        (AttentionSettings, {"min_time": math.nan}, "--min-time must be at least 0"),
        (AttentionSettings, {"threads": 0}, "--threads must be at least 1"),
        (ModelSettings, {"size": "huge"}, "--size must be one of regular, small"),
        (ModelSettings, {"attentions": ("favor-cos",)}, "--attentions must be one of"),
        (ModelSettings, {"dropout": 1.0}, "--dropout must be at least 0 and below 1"),
        (DecodeSettings, {"contexts": (5, 5)}, "--contexts must be positive and rise"),
        (DecodeSettings, {"tokens": 0}, "--tokens must be at least 1"),
    ],
)
def test_settings_out_of_range(settings, changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)
