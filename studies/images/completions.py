"""Lower halves of pictures, drawn value by value from a state of constant size."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from performers.app.files import read_json
from performers.models import PerformerForCausalLM
from performers.streams.images import BEGIN, CentreCrops, row_picture
from performers.training.environment import quiet_transformers
from studies.images.models import Size
from studies.parts import Part

_SAMPLES = 2
_SHOWN = 3
_GAP = 2


@torch.no_grad()
def complete(model: PerformerForCausalLM, values: Tensor, given: int, *, seed: int) -> Tensor:
    """Pictures whose first values are those of others, and whose rest is drawn from a model.

    Returns:
        Integers from 0 to 255, shaped like ``values``.
    """
    model.eval()
    begin = values.new_full((len(values), 1), BEGIN)
    torch.manual_seed(seed)
    rows = model.generate(
        torch.cat((begin, values[:, :given]), dim=1),
        max_new_tokens=values.shape[1] - given,
        do_sample=True,
        # All values, by their probabilities.
        top_k=0,
        suppress_tokens=[BEGIN],
        use_cache=True,
    )
    return rows[:, 1:]


def complete_best(
    folders: Mapping[str, Path], tests: CentreCrops, size: Size, output: Path
) -> Part:
    """Complete lower halves of test pictures, twice, by the Performer with the fewest bits.

    Each line of ``completions.png`` has the original, its upper half, and the two completions.

    Returns:
        ``contestant``, ``values`` that were drawn for each, processor ``seconds`` for all,
        ``cache_bytes`` of the state of one, and its ``exact_bytes``: those of the keys and values
        of the whole row.
    """
    parts = read_json(output / "results.json")["parts"]
    performers = [name for name in folders if name.startswith("Performer") and name in parts]
    common = min(len(parts[name]["bits"]) for name in performers)
    best = min(performers, key=lambda name: fmean(parts[name]["bits"][:common]))
    with quiet_transformers():
        model = PerformerForCausalLM.from_pretrained(folders[best])
    count = size.completions
    values = torch.stack([tests[index]["labels"] for index in range(count)])
    given = values.shape[1] // 2
    start = time.process_time()
    rows = complete(model, values.repeat(_SAMPLES, 1), given, seed=size.seed)
    seconds = time.process_time() - start
    drawn = [row_picture(row, tests.size) for row in rows]
    lines = []
    for number in range(count):
        picture = tests.picture(number)
        masked = picture.reshape(-1).copy()
        masked[given:] = 127
        lines.append([picture, masked.reshape(picture.shape), *drawn[number::count]])
    grid(lines).save(output / "completions.png")
    with torch.no_grad():
        cache = model(values[:1, :given], use_cache=True).past_key_values
    config = model.config
    return {
        "contestant": best,
        "pictures": count,
        "samples": _SAMPLES,
        "values": values.shape[1] - given,
        "seconds": seconds,
        "cache_bytes": cache.nbytes,
        "exact_bytes": 2 * 4 * config.num_hidden_layers * config.hidden_size * values.shape[1],
    }


def grid(lines: Sequence[Sequence[npt.NDArray[np.uint8]]]) -> Image.Image:
    """Pictures in lines on white, each pixel as a square of three."""
    side = lines[0][0].shape[0] * _SHOWN + _GAP
    sheet = Image.new("RGB", (side * len(lines[0]), side * len(lines)), "white")
    for row, line in enumerate(lines):
        for column, picture in enumerate(line):
            shown = Image.fromarray(picture.repeat(_SHOWN, 0).repeat(_SHOWN, 1))
            sheet.paste(shown, (side * column, side * row))
    return sheet
