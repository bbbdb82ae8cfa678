"""Inputs on which a model class of transformers runs, made up from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from performers.convert.families.trial import find
from tests.convert.small_models import VOCABULARY

# Tokens with a meaning of their own have larger ids than these.
PLAIN_TOKENS = (5, 70)
ROWS, LENGTH = 2, 20
_MEL = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")
_MEL += ("n_mels", "input_size", "mel_dim")


class Inputs:
    """Random inputs of a model, by the names of the arguments of its ``forward``."""

    def __init__(
        self, model: PreTrainedModel, rows: int = ROWS, length: int = LENGTH, seed: int = 0
    ) -> None:
        self.config, self.rows, self.length = model.config, rows, length
        parameters = inspect.signature(model.forward).parameters
        self.names = set(parameters)
        self.required = [
            name
            for name, each in parameters.items()
            if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
        ]
        self.generator = torch.Generator().manual_seed(seed)

    def tokens(self, length: int) -> Tensor:
        text = getattr(self.config, "text_config", None) or self.config
        positions = find(text, "max_position_embeddings", default=512)
        known = find(text, "vocab_size", default=VOCABULARY)
        if isinstance(positions, int):
            length = min(length, max(positions, 4))
        low, high = PLAIN_TOKENS
        high = min(high, known) if isinstance(known, int) and known > low else high
        return torch.randint(low, high, (self.rows, length), generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn((self.rows, *shape), generator=self.generator)

    def image(self) -> tuple[int, int, int, int, int]:
        """Channels, height, width, and the side of a patch and its frames, of a model's images."""
        vision = getattr(self.config, "vision_config", None) or self.config
        size = find(vision, "image_size", "img_size", "input_image_size", default=32)
        if isinstance(size, dict):
            size = (size.get("height", 32), size.get("width", 32))
        height, *_, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = find(vision, "num_channels", "in_channels", "in_chans", default=3)
        patch = find(self.config, "patch_size", default=8)
        patch = patch if isinstance(patch, int) else patch[0]
        time = find(self.config, "temporal_patch_size", default=1)
        return channels if isinstance(channels, int) else 3, int(height), int(width), patch, time

    def text(self) -> dict[str, Tensor]:
        if "input_ids" not in self.names:
            return {}
        given = {"input_ids": self.tokens(self.length)}
        if "bbox" in self.names:
            corner = torch.randint(0, 8, (self.rows, self.length, 2), generator=self.generator)
            given["bbox"] = torch.cat((corner, corner + 3), -1)
        return given

    def decoder(self) -> dict[str, Tensor]:
        if "decoder_input_ids" in self.names:
            return {"decoder_input_ids": self.tokens(12)}
        return {}

    def images(self) -> Iterator[dict[str, Tensor]]:
        channels, height, width, patch, time = self.image()
        # Towers that take patches and the shape of their grid, under two names.
        for grid in sorted({"image_grid_thw", "grid_thw"} & self.names):
            for name in {"pixel_values", "hidden_states"} & self.names:
                flat = self.normal(16, channels * time * patch * patch).flatten(0, 1)
                yield {name: flat, grid: torch.tensor([[1, 4, 4]] * self.rows)}
        frames = find(self.config, "num_frames", "frames_per_clip", default=4)
        if "pixel_values_videos" in self.names:
            yield {"pixel_values_videos": self.normal(frames, channels, height, width)}
        if "pixel_values" not in self.names:
            return
        single = {"pixel_values": self.normal(1, channels, height, width)}
        if "image_attention_mask" in self.names:
            yield single
        patches = {"pixel_values": self.normal(16, channels * patch * patch)}
        if "pixel_position_ids" in self.names:
            places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
            yield {**patches, "pixel_position_ids": places.expand(self.rows, 16, 2)}
        if "target_sizes" in self.names:
            yield {"pixel_values": self.normal(channels, patch, 16 * patch)}
        pixels = {"pixel_values": self.normal(channels, height, width)}
        if "image_sizes" in self.names:
            yield {**pixels, "image_sizes": torch.tensor([[height, width]] * self.rows)}
        yield pixels
        frames = find(self.config, "num_frames", default=2)
        yield {"pixel_values": self.normal(frames, channels, height, width)}
        yield single
        if {"spatial_shapes", "pixel_attention_mask"} <= self.names:
            yield {
                **patches,
                "spatial_shapes": torch.tensor([[4, 4]] * self.rows),
                "pixel_attention_mask": torch.ones(self.rows, 16, dtype=torch.int64),
            }

    def audio(self) -> Iterator[dict[str, Tensor]]:
        if "input_features" in self.names:
            mel = find(self.config, *_MEL, default=80)
            source = find(self.config, "max_source_positions", default=50)
            for shape in ((mel, 2 * source), (2 * source, mel), (64, mel), (1, 64, mel), (mel, 64)):
                features = {"input_features": self.normal(*shape)}
                yield features
                for axis in (-1, -2):
                    ones = torch.ones(self.rows, shape[axis], dtype=torch.int64)
                    masks = {"input_features_mask", "feature_attention_mask", "attention_mask"}
                    for mask in masks & self.names:
                        yield {**features, mask: ones}
        if "input_values" in self.names:
            mel = find(self.config, "num_mel_bins", default=80)
            long = find(self.config, "max_length", default=64)
            for shape in ((6000,), (1, 6000), (long, mel), (64, mel)):
                yield {"input_values": self.normal(*shape)}

    def series(self) -> Iterator[dict[str, Tensor]]:
        if "past_values" not in self.names:
            return
        length = find(self.config, "context_length", default=32)
        lags = max(find(self.config, "lags_sequence", default=[0]))
        channels = find(self.config, "num_input_channels", "input_size", default=1)
        total = length + lags
        yield {"past_values": self.normal(total, channels)}
        values = self.normal(total)
        yield {"past_values": values}
        features = find(self.config, "num_time_features", default=0)
        given = {
            "past_values": values,
            "past_time_features": self.normal(total, features),
            "past_observed_mask": torch.ones_like(values),
        }
        future = find(self.config, "prediction_length", default=4)
        yield {name: value for name, value in given.items() if name in self.names}
        yield {
            **given,
            "future_values": self.normal(future),
            "future_time_features": self.normal(future, features),
        }

    def completed(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with arguments that only a few models have."""
        more: dict[str, Callable[[], Tensor]] = {
            "qformer_input_ids": lambda: self.tokens(8),
            "task_inputs": lambda: self.tokens(find(self.config, "task_seq_len", default=77)),
            "merge_sizes": lambda: torch.ones(self.rows, dtype=torch.int64),
            "target_sizes": lambda: torch.tensor([[4, 4]] * self.rows),
            "visual_feats": lambda: self.normal(4, self.config.visual_feat_dim),
            "visual_pos": lambda: self.normal(4, self.config.visual_pos_dim),
            "image_attention_mask": lambda: torch.ones(self.rows, self.length, 1).long(),
            "query_embeds": lambda: self.normal(8, find(self.config, "hidden_size", default=32)),
            "past_values_padding": lambda: torch.zeros(given["past_values"].shape),
            "freq": lambda: torch.zeros(self.rows, 1, dtype=torch.int64),
        }
        wanted = {"visual_feats", "visual_pos", "image_attention_mask", *self.required}
        if "image_embeds_position_mask" in self.names and "pixel_values" in given:
            mask = torch.zeros(self.rows, self.length, dtype=torch.bool)
            mask[:, 1 : 1 + find(self.config, "latent_query_num")] = True
            given = {**given, "image_embeds_position_mask": mask}
        for name, make in more.items():
            if name in wanted and name in self.names and name not in given:
                given = {**given, name: make()}
        return given

    def candidates(self) -> Iterator[dict[str, Tensor]]:
        """Inputs to be tried, richest first."""
        for given in self._candidates():
            yield self.completed(given)

    def _candidates(self) -> Iterator[dict[str, Tensor]]:
        text, decoder = self.text(), self.decoder()
        kinds = (self.images, self.audio, self.series)
        for other in (other for kind in kinds for other in kind()):
            if text:
                yield {**text, **other, **decoder}
            if decoder:
                yield {**other, **decoder}
            yield other
        if text:
            yield {**text, **decoder}
            yield text
            yield {**text, "use_cache": False}
        width = find(self.config, "hidden_size", "d_model", default=32)
        for name in ("inputs_embeds", "hidden_states"):
            if name in self.names:
                yield {name: self.normal(self.length, width)}
        if "query_embeds" in self.names:
            width = find(self.config, "encoder_hidden_size", default=32)
            yield {"encoder_hidden_states": self.normal(self.length, width)}
        if "states" in self.names:
            yield {
                "states": self.normal(self.length, self.config.state_dim),
                "actions": self.normal(self.length, self.config.act_dim),
                "rewards": self.normal(self.length, 1),
                "returns_to_go": self.normal(self.length, 1),
                "timesteps": torch.arange(self.length).expand(self.rows, self.length),
                "attention_mask": torch.ones(self.rows, self.length, dtype=torch.int64),
            }
        if "decoder_input_values" in self.names and "input_values" in self.names:
            width = find(self.config, "hidden_size", default=32)
            names = {"input_values": self.length, "decoder_input_values": 12}
            yield {name: self.normal(size, width) for name, size in names.items()}
        if {"input_features", "input_values"} <= set(self.required):
            mel = find(self.config, "num_mel_bins", default=80)
            yield {"input_features": self.normal(64, mel), "input_values": self.normal(1, 6400)}


def with_placeholders(config: Any, given: dict[str, Any], count: int) -> dict[str, Any]:
    """The same inputs, with so many placeholders of an image or a sound in each row."""
    name = "image_token_id" if "pixel_values" in given else "audio_token_id"
    token = find(config, name, name.replace("_id", "_index"))
    ids = given["input_ids"]
    marks = torch.full((len(ids), count), int(token), dtype=ids.dtype)
    ids = torch.cat((ids[:, :2], marks, ids[:, 2:]), 1)
    return {**given, "input_ids": ids}
