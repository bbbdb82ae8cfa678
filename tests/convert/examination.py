"""Examination of a model class of transformers: converted to equal outputs, or refused.

A model that `to_performer` accepts, with a window that covers its input, computes the outputs of
the original; any other model is refused before anything is changed.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import re
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from performers.convert import to_performer
from performers.convert.interface.implementation import interface_modules
from performers.nn import FavorAttention
from tests.convert import small_models
from tests.convert.small_inputs import ROWS, Inputs, with_placeholders
from tests.convert.small_models import SIZES

EQUAL, REFUSED, LATE = "equal", "refused", "late refusal"
WRONG, CRASH, UNBUILT = "wrong", "crash", "not buildable"
BROKEN = (LATE, WRONG, CRASH)
# Longer than any input here.
WINDOW = 4096
TOLERANCE = 1e-4
NEW_TOKENS = 5
SECONDS = 60

Given = dict[str, Any]
# Places in a model's outputs, and what is there.
Outputs = dict[str, Tensor]


@dataclasses.dataclass
class Row:
    """The outcome for one class.

    Attributes:
        status: The worst of its checks.
        detail: Sentence of a refusal, type and place of an error, differing outputs, or the reason
            why the class cannot be built small.
        attention: Modules that call the attention interface, converted and called ones; inputs.
    """

    name: str
    status: str
    detail: str
    attention: str = ""
    seconds: float = 0.0


class NotBuildable(Exception):
    """No small model of a class runs on the inputs that are tried."""


def examine(name: str, model_type: str) -> Row:
    """Convert a small model of a class and compare it with the original."""
    start = time.perf_counter()
    try:
        row = _examine(name, *_original(small_models.model_class(name, model_type)))
    except NotBuildable as error:
        row = Row(name, UNBUILT, str(error))
    row.seconds = time.perf_counter() - start
    return row


def _original(kind: Any) -> tuple[Any, Given]:
    """A model of a class, and inputs on which it runs the same twice."""
    reasons: dict[str, None] = {}
    start = time.perf_counter()
    for sizes in SIZES:
        if time.perf_counter() - start > SECONDS / 6:
            reasons["no time for larger sizes"] = None
            break
        for sharp in (True, False):
            try:
                model = small_models.small_model(kind, sizes, sharp=sharp)
            except Exception as error:
                reasons[f"construction: {describe(error)}"] = None
                break
            given, reason = _inputs(model)
            if given is not None:
                return model, given
            reasons[reason] = None
            if not reason.startswith("outputs"):
                break
    raise NotBuildable("; ".join(reasons))


def _inputs(model: Any) -> tuple[Given | None, str]:
    reasons: list[str] = []
    for candidate in Inputs(model).candidates():
        given: Given | None = candidate
        for _ in range(3):
            try:
                first, second = run(model, given), run(model, given)
            except Exception as error:
                reasons.append(f"run on {', '.join(given)}: {describe(error)}")
                given = _repaired(model, candidate, given, str(error))
                if given is None:
                    break
                continue
            if not first:
                reasons.append("no tensors come out")
            elif any(x.isnan().any() or not x.isfinite().any() for x in first.values()):
                reasons.append("outputs are not finite")
            elif differences(first, second):
                reasons.append("outputs differ from run to run")
            else:
                return given, ""
            break
    last = f" [last: {reasons[-1]}]" if len(reasons) > 1 else ""
    return None, (reasons or ["no inputs known"])[0] + last


def _repaired(model: Any, candidate: Given, given: Given, error: str) -> Given | None:
    """Inputs of another size, as an error asks for them."""
    if "input_ids" in given and len(given) > 1 and re.search("token|feature", error):
        numbers = [int(n) for n in re.findall(r"\d+", error)]
        if numbers and max(numbers) % ROWS == 0 and 0 < max(numbers) < 20000:
            with contextlib.suppress(TypeError):
                return with_placeholders(model.config, candidate, max(numbers) // ROWS)
    if match := re.search(r"cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", error):
        size, wanted = int(match[1]), int(match[2])
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] == size:
                generator = torch.Generator().manual_seed(0)
                return {**given, name: torch.randn(*value.shape[:-1], wanted, generator=generator)}
    return None


def run(model: Any, given: Given, **options: Any) -> Outputs:
    """The tensors that come out of a model."""
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(tensors(model(**copy.deepcopy(given), **options)))


def tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors within an output, with their places; caches are passed over."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, collections.abc.Mapping):
        for key in value:
            yield from tensors(value[key], f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from tensors(each, f"{place}[{index}]")


def difference(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    if expected.shape != actual.shape or not torch.equal(expected.isfinite(), actual.isfinite()):
        return float("inf")
    if expected.numel() == 0 or torch.equal(expected, actual):
        return 0.0
    if not expected.is_floating_point():
        return float("inf")
    expected, actual = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (expected, actual))
    return float((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-6))


def differences(expected: Outputs, actual: Outputs, tolerance: float = 0.0) -> dict[str, float]:
    """Places whose tensors differ, and by how much; infinity where one is missing."""
    gaps = {
        place: difference(expected[place], actual[place])
        if place in expected and place in actual
        else float("inf")
        for place in {**expected, **actual}
    }
    return {place: gap for place, gap in gaps.items() if gap > tolerance}


def _examine(name: str, model: Any, given: Given) -> Row:
    modules = f"{len(list(interface_modules(model)))} modules"
    options = {"window": WINDOW, "num_features": 8}
    generator = torch.Generator().manual_seed(0)
    try:
        converted = to_performer(copy.deepcopy(model), **options, generator=generator)
    except ValueError as error:
        return Row(name, REFUSED, one_line(str(error)), modules)
    except Exception as error:
        return Row(name, CRASH, f"conversion: {describe(error)}", modules)
    blocks = [module for module in converted.modules() if isinstance(module, FavorAttention)]
    called = set()
    for block in blocks:
        block.register_forward_hook(lambda block, *_: called.add(block))
    notes, worst = [], EQUAL
    for check in (_forward, _padding, _attentions, _generate):
        label = check.__name__.strip("_")
        status, note = check(model, converted, given)
        if note:
            notes.append(f"{label}: {status}: {note}" if status else f"{label}: {note}")
        worst = max(worst, status or EQUAL, key=(EQUAL, *BROKEN).index)
    attention = f"{modules}, {len(blocks)} converted, {len(called)} called; {'+'.join(given)}"
    return Row(name, worst, "; ".join(notes), attention)


Outcome = tuple[str, str]


def _compare(
    model: Any, converted: Any, call: Callable[[Any], Outputs], expected: Outputs
) -> Outcome:
    try:
        actual = call(converted)
    except ValueError as error:
        return LATE, describe(error)
    except Exception as error:
        return CRASH, describe(error)
    gaps = differences(expected, actual, TOLERANCE)
    if not gaps:
        return EQUAL, ""
    # A chaotic model turns rounding into as much.
    noise = differences(expected, call(_perturbed(model)))
    text = ", ".join(f"{place} {gap:.1e}" for place, gap in list(gaps.items())[:3])
    if all(gap <= noise.get(place, 0.0) for place, gap in gaps.items()):
        return EQUAL, f"within rounding ({text})"
    return WRONG, text


def _perturbed(model: Any) -> Any:
    """The model with weights a few roundings away."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
    return other


def _forward(model: Any, converted: Any, given: Given) -> Outcome:
    return _compare(model, converted, lambda m: run(m, given), run(model, given))


def _padding(model: Any, converted: Any, given: Given) -> Outcome:
    """With the end of the last row masked; tokens that are not padding are compared."""
    ids = given.get("input_ids")
    if ids is None or "attention_mask" not in Inputs(model).names or "attention_mask" in given:
        return "", ""
    mask = torch.ones_like(ids)
    mask[-1, -7:] = 0

    def call(m: Any) -> Outputs:
        outputs = run(m, {**given, "attention_mask": mask})
        return {k: x[mask.bool()] for k, x in outputs.items() if x.shape[:2] == mask.shape}

    try:
        expected = call(model)
    except Exception as error:
        return "", f"the original does not run: {describe(error)}"
    return _compare(model, converted, call, expected)


def _attentions(model: Any, converted: Any, given: Given) -> Outcome:
    """With ``output_attentions``: the same maps, or a refusal."""

    def call(m: Any, given: Given) -> Outputs:
        if m is not converted:
            m = copy.deepcopy(m)
            m.set_attn_implementation("eager")
        return run(m, given, output_attentions=True)

    for inputs in ({**given, "use_cache": False}, given):
        try:
            expected = call(model, inputs)
        except Exception:
            continue
        if len(expected) == len(run(model, given)):
            return "", ""
        status, note = _compare(model, converted, lambda m, x=inputs: call(m, x), expected)
        return ("", f"refused: {note}") if status == LATE else (status, note)
    return "", ""


def _generate(model: Any, converted: Any, given: Given) -> Outcome:
    if not hasattr(model, "generate") or not model.can_generate():
        return "", ""
    if not any(getattr(module, "is_causal", False) for module in model.modules()):
        # An encoder under a decoder's head: its tokens see those that come after them.
        return "", ""
    prompt = {key: value for key, value in given.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"num_beams": 1, "output_logits": True, "return_dict_in_generate": True}

    def call(m: Any) -> Outputs:
        torch.manual_seed(0)
        return dict(tensors(m.generate(**copy.deepcopy(prompt), **options)))

    try:
        expected, again = call(model), call(model)
    except Exception as error:
        return "", f"the original does not: {describe(error)}"
    if differences(expected, again):
        return "", "the original differs from run to run"
    return _compare(model, converted, call, expected)


def describe(error: BaseException) -> str:
    """Type, text and innermost place of an error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "transformers/models" in frame.filename or "/performers/" in frame.filename:
            place = f" ({Path(frame.filename).name}:{frame.lineno} {frame.name})"
            break
    else:
        place = ""
    return f"{type(error).__name__}: {one_line(str(error))[:300]}{place}"


def one_line(text: str) -> str:
    return " ".join(text.split())
