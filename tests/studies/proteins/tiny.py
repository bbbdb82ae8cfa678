"""A study small enough for a test."""

from dataclasses import replace

from performers.proteins.inputs.records import ProteinRecord
from performers.training.options import TrainingOptions
from studies.proteins.data import StudyData
from studies.proteins.presets import StudyPreset
from tests.proteins.runs import proteins

TRAINING = TrainingOptions(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_features=8,
    max_length=64,
    batch_tokens=256,
    steps=4,
    learning_rate=1e-3,
    dropout=0.0,
    redraw_steps=0,
    save_steps=2,
    eval_steps=4,
)

PRESET = StudyPreset(
    training=TRAINING,
    seeds=(0, 1),
    masked=("exact", "favor-relu", "linformer"),
    causal=("exact", "favor-relu"),
    kernels=("favor-exp",),
    window=4,
    long=replace(
        TRAINING, attention="favor-relu", packed=True, across_sequences=True, max_length=256
    ),
    context_lengths=(128, 256),
    context_exact=128,
    learnt=8,
)


def data():
    """Thirty proteins to train on, ten of each split to score."""

    def records(seed):
        made = proteins(10, shortest=20, seed=seed)
        return [ProteinRecord(f"P{seed}{i}", "", sequence) for i, sequence in enumerate(made)]

    return StudyData(
        "made up",
        proteins(30, shortest=20),
        proteins(5, shortest=20, seed=1),
        {"test": records(2), "ood": records(3)},
        {"data": "made up"},
    )
