"""Configurations: defaults, what is refused and how, learned positions, missing packages."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from performers.features import ESTIMATORS
from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.models.attention import ExactMechanism, FavorMechanism
from performers.models.positions import AxialPositions, sinusoids
from tests.models.cases import causal_model, make_config, masked_model, tokens


def test_the_default_is_the_regular_model_of_the_paper():
    config = PerformerConfig()
    assert (config.num_attention_heads, config.num_hidden_layers) == (8, 6)
    assert (config.intermediate_size, config.hidden_size, config.head_dim) == (2048, 512, 64)
    assert config.attention == "favor-softmax"
    assert config.position_embedding == "rotary"
    assert config.tie_word_embeddings
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "softmax"}, ("attention", "'softmax'", "favor-softmax", "exact")),
        ({"attention": "favor-rlu"}, ("attention", "'favor-rlu'", "favor-relu")),
        ({"attention": None}, ("attention", "None")),
        ({"position_embedding": "alibi"}, ("position_embedding", "'alibi'", "rotary")),
        ({"axial_shape": (4, 32)}, ("axial_shape", "position_embedding='axial'", "'rotary'")),
        *(
            ({"position_embedding": "axial", "axial_shape": shape}, ("axial_shape must be", "grid"))
            for shape in (None, (), (0, 4), (128.0,), (128, True))
        ),
        (
            {"position_embedding": "axial", "axial_shape": (4, 4, 3)},
            ("axial_shape", "48 places", "max_position_embeddings is 128"),
        ),
        ({"estimator": "favor"}, ("estimator", "'favor'", *ESTIMATORS)),
        ({"projection": "qr"}, ("projection", "'qr'", "orthogonal")),
        ({"projection": None}, ("projection", "favor-softmax")),
        ({"num_attention_heads": 3}, ("hidden_size", "num_attention_heads", "32", "3")),
        ({"num_attention_heads": 32}, ("head_dim", "num_attention_heads", "rotary", "1")),
        ({"hidden_act": "gleu"}, ("hidden_act", "'gleu'", "gelu")),
        ({"hidden_dropout_prob": 1.5}, ("hidden_dropout_prob", "1.5")),
        ({"hidden_dropout_prob": -0.1}, ("hidden_dropout_prob", "-0.1")),
        *(
            ({name: 0}, (name, "0"))
            for name in (
                *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
                *("intermediate_size", "max_position_embeddings", "num_features"),
            )
        ),
        ({"estimator": "hyperbolic", "num_features": 33}, ("num_features", "even", "33")),
        (
            {"attention": "favor-relu", "projection": None, "num_features": 99},
            ("num_features", "99", "projection"),
        ),
        ({"pad_token_id": 31}, ("pad_token_id", "31", "vocab_size")),
        ({"pad_token_id": -1}, ("pad_token_id", "-1")),
        ({"chunk_size_feed_forward": -1}, ("chunk_size_feed_forward must be at least 0", "-1")),
        *(({name: -1}, (f"{name} must be at least 0",)) for name in ("window", "sinks")),
        *(
            ({"attention": name, "window": 8, "sinks": 2}, ("window and sinks need", name))
            for name in ("favor-relu", "exact", "identity")
        ),
        *(
            ({"exact_layers": layers}, ("exact_layers must be indices", "0..1, got"))
            for layers in ([2], [-1], [0.0], ["0", 1], [True])
        ),
        *(
            ({"attention": name, "exact_layers": [0]}, ("exact_layers needs a favor", name))
            for name in ("exact", "identity")
        ),
    ],
    ids=str,
)
def test_options_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        PerformerForMaskedLM(make_config(**options))
    for word in words:
        assert word in str(error.value)


def test_the_configuration_loads_from_its_file(tmp_path):
    config = make_config("favor-gelu", num_features=20, features_per_head=True, is_decoder=True)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "performer"
    for loaded in (
        PerformerConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        PerformerConfig(**written),
    ):
        assert type(loaded) is PerformerConfig
        written_by = {"transformers_version": None, "_name_or_path": ""}
        assert loaded.to_dict() | written_by == config.to_dict() | written_by


def test_exact_layers_are_a_sorted_list(tmp_path):
    config = make_config(num_hidden_layers=4, exact_layers=(2, 0, 2))
    config.save_pretrained(tmp_path)
    for each in (config, PerformerConfig.from_pretrained(tmp_path)):
        assert each.exact_layers == [0, 2]
        model = PerformerForMaskedLM(each)
        kinds = [type(layer.attention.mechanism) for layer in model.performer.layers]
        assert kinds == [ExactMechanism, FavorMechanism] * 2
    for none in (None, [], ()):
        assert make_config(exact_layers=none).exact_layers is None
    assert make_config("favor-relu", exact_layers=[1]).layer_attention(1) == "exact"


def test_the_number_of_features_is_the_one_asked_for():
    for attention in ("favor-softmax", "favor-relu"):
        model = PerformerForMaskedLM(make_config(attention, num_features=40))
        feature_map = model.performer.layers[0].attention.mechanism.feature_map
        assert feature_map.num_features == 40
        assert feature_map.weight.shape == (1, 40, 16)
        model = PerformerForMaskedLM(make_config(attention, features_per_head=True))
        assert model.performer.layers[0].attention.mechanism.feature_map.weight.shape[0] == 2


def test_learned_positions_end_with_their_table():
    options = {"position_embedding": "learned", "max_position_embeddings": 12}
    model = masked_model(**options)
    assert model(tokens(1, 12)).logits.shape == (1, 12, 31)
    with pytest.raises(ValueError, match=r"13 positions .*max_position_embeddings is 12"):
        model(tokens(1, 13))
    # Padding is no position.
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[:, 12:] = 0
    assert torch.isfinite(model(tokens(1, 14), attention_mask=mask).logits).all()
    causal = causal_model(**options)
    past = causal(tokens(1, 12), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="max_position_embeddings"):
        causal(tokens(1, 1), past_key_values=past)


def test_axial_positions_are_sums_of_coordinates():
    """Against nested loops over rows, columns and channels."""
    positions = AxialPositions((3, 4, 2), 5)
    rows, columns, channels = (table.weight for table in positions.tables)
    expected = [
        rows[row] + columns[column] + channels[channel]
        for row in range(3)
        for column in range(4)
        for channel in range(2)
    ]
    torch.testing.assert_close(positions(torch.arange(24)[None])[0], torch.stack(expected))
    shuffled = torch.tensor([[7, 0], [23, 7]])
    found = positions(shuffled)
    torch.testing.assert_close(found, torch.stack(expected)[shuffled])


def test_axial_positions_end_with_their_grid():
    options = {"position_embedding": "axial", "axial_shape": (2, 2, 3)}
    options["max_position_embeddings"] = 12
    model = causal_model(**options)
    assert model.config.longest_input == 12
    tables = model.performer.positions.tables
    assert [len(table.weight) for table in tables] == [2, 2, 3]
    past = model(tokens(1, 12), use_cache=True).past_key_values
    for call in ({"input_ids": tokens(1, 13)}, {"input_ids": tokens(1, 1), "cache": past}):
        with pytest.raises(ValueError, match=r"13 positions .*max_position_embeddings is 12"):
            model(**call)


@pytest.mark.parametrize(("name", "size"), [("rotary", 32), ("sinusoidal", 30)])
def test_other_positions_do_not_end(name, size):
    """Rotary ones alone need pairs."""
    model = masked_model(position_embedding=name, hidden_size=size, max_position_embeddings=12)
    assert torch.isfinite(model(tokens(1, 500)).logits).all()


def test_sinusoids_are_those_of_the_paper():
    waves = sinusoids(torch.arange(5)[None], 6)
    for position in range(5):
        angles = [position / 10000 ** (2 * index / 6) for index in range(3)]
        expected = torch.tensor(angles)
        torch.testing.assert_close(waves[0, position], torch.cat((expected.sin(), expected.cos())))
    assert sinusoids(torch.arange(5)[None], 7).shape == (1, 5, 7)


BLOCKED = """
import sys
sys.modules["transformers"] = None
import performers
assert performers.favor_attention
try:
    import performers.models
except ImportError as error:
    print(error)
"""


@pytest.mark.exhaustive
def test_without_transformers_the_message_names_the_extra():
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "performers.models needs transformers" in result.stdout
    assert "pip install 'performers[models]'" in result.stdout
