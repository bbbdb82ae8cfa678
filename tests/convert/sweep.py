"""Conversion of every model class of transformers that can be built small.

A model that `to_performer` accepts, with a window that covers its input, computes the outputs of
the original; any other model is refused before anything is changed.
``python -m tests.convert.sweep --output FILE`` writes a table of all classes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import io
import logging
import multiprocessing
import multiprocessing.connection
import re
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from tests.convert import small_models
from tests.convert.small_inputs import ROWS, Inputs, with_placeholders
from tests.convert.small_models import SIZES, attention_flags, model_classes

EQUAL, REFUSED, LATE = "equal", "refused", "late refusal"
WRONG, CRASH, UNBUILT = "wrong", "crash", "not buildable"
BROKEN = (LATE, WRONG, CRASH)
# Heads that only read the last hidden state share the attention of their base.
_HEADS = "CAUSAL_LM|SEQ_TO_SEQ_CAUSAL_LM|SPEECH_SEQ_2_SEQ|MULTIMODAL_LM"
MAPPINGS = rf"^MODEL(_FOR_({_HEADS}))?_MAPPING_NAMES$"
# Longer than any input here.
WINDOW = 4096
TOLERANCE = 1e-4
NEW_TOKENS = 5
SECONDS = 60
BYTES = 10 * 2**30


@dataclasses.dataclass
class Row:
    """The outcome for one class.

    Attributes:
        name: The class.
        status: The worst of its checks.
        detail: Sentence of a refusal, type and place of an error, differing outputs, or the reason
            why the class cannot be built small.
        attention: Modules that call the attention interface, and how many of them were converted
            and called.
        seconds: Wall time.
    """

    name: str
    status: str
    detail: str
    attention: str = ""
    seconds: float = 0.0


def examine(name: str, model_type: str, flags: Mapping[str, Any] | None = None) -> Row:
    """Convert a small model of a class and compare it with the original.

    Args:
        name: The class.
        model_type: Its model type in the auto mappings.
        flags: Other values of its configuration's fields.
    """
    start = time.perf_counter()
    try:
        model, given = _original(small_models.model_class(name, model_type), flags)
    except _NotBuildable as error:
        row = Row(name, UNBUILT, str(error))
    else:
        row = _examine(name, model, given)
    row.name = " ".join((name, *(f"{key}={value}" for key, value in (flags or {}).items())))
    row.seconds = time.perf_counter() - start
    return row


class _NotBuildable(Exception):
    pass


def _original(kind: Any, flags: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """A model of a class, and inputs on which it runs the same twice."""
    reasons = []
    start = time.perf_counter()
    for sizes in SIZES:
        if time.perf_counter() - start > SECONDS / 6:
            reasons.append("no time for larger sizes")
            break
        for sharp in (True, False):
            try:
                model = small_models.small_model(kind, sizes, sharp=sharp, flags=flags)
            except Exception as error:
                reasons.append(f"construction: {_describe(error)}")
                break
            given, reason = _inputs(model)
            if given is not None:
                return model, given
            reasons.append(reason)
            if not reason.startswith("outputs"):
                break
    raise _NotBuildable("; ".join(dict.fromkeys(reasons)))


def _inputs(model: Any) -> tuple[dict[str, Any] | None, str]:
    reasons: list[str] = []
    for candidate in Inputs(model).candidates():
        given = candidate
        for _ in range(3):
            try:
                first, second = run(model, given), run(model, given)
            except Exception as error:
                reasons.append(f"run on {', '.join(given)}: {_describe(error)}")
                if (other := _repaired(model, candidate, given, str(error))) is not None:
                    given = other
                    continue
                break
            if not first:
                reasons.append("no tensors come out")
            elif not all(bool(x.isfinite().any()) and not bool(x.isnan().any()) for _, x in first):
                reasons.append("outputs are not finite")
            elif differences(first, second):
                reasons.append("outputs differ from run to run")
            else:
                return given, ""
            break
    return None, (reasons or ["no inputs known"])[0] + (
        f" [last: {reasons[-1]}]" if len(reasons) > 1 else ""
    )


def _repaired(
    model: Any, candidate: dict[str, Any], given: dict[str, Any], error: str
) -> dict[str, Any] | None:
    """Inputs of another size, as an error asks for them."""
    if "input_ids" in given and len(given) > 1 and re.search("token|feature", error):
        numbers = [int(n) for n in re.findall(r"\d+", error)]
        if numbers and max(numbers) % ROWS == 0 and 0 < max(numbers) < 20000:
            with contextlib.suppress(TypeError):
                return with_placeholders(model.config, candidate, max(numbers) // ROWS)
    if match := re.search(r"cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", error):
        found, wanted = int(match[1]), int(match[2])
        for name, value in given.items():
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                *rest, size = value.shape
                if size == found:
                    generator = torch.Generator().manual_seed(0)
                    return {**given, name: torch.randn(*rest, wanted, generator=generator)}
    return None


def run(model: Any, given: dict[str, Any], **options: Any) -> list[tuple[str, Tensor]]:
    """The tensors that come out of a model, with their places."""
    torch.manual_seed(0)
    with torch.no_grad():
        return list(tensors(model(**copy.deepcopy(given), **options)))


def _runs(model: Any, given: dict[str, Any]) -> bool:
    try:
        run(model, given)
    # Any error at all: these are no inputs of the model.
    except Exception:
        return False
    return True


def tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors within an output, with their places; caches are passed over."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, collections.abc.Mapping):
        for key in value:
            yield from tensors(value[key], f"{place}.{key}" if place else str(key))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name), f"{place}.{field.name}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from tensors(each, f"{place}[{index}]")


def difference(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    if expected.shape != actual.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if bool((expected == actual).all()) else float("inf")
    finite = expected.isfinite()
    if bool((finite != actual.isfinite()).any()):
        return float("inf")
    expected, actual = expected[finite].double(), actual[finite].double()
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(1e-6)
    return float((expected - actual).abs().max() / scale)


def differences(
    expected: list[tuple[str, Tensor]], actual: list[tuple[str, Tensor]], tolerance: float = 0.0
) -> dict[str, float]:
    """Places whose tensors differ, and by how much; infinity where one is missing."""
    left, right = dict(expected), dict(actual)
    found = {}
    for place in dict.fromkeys((*left, *right)):
        if place not in left or place not in right:
            found[place] = float("inf")
        elif (gap := difference(left[place], right[place])) > tolerance:
            found[place] = gap
    return found


def _examine(name: str, model: Any, given: dict[str, Any]) -> Row:
    from performers.convert import to_performer
    from performers.convert.interface.implementation import interface_modules
    from performers.nn import FavorAttention

    modules = len(list(interface_modules(model)))
    try:
        converted = to_performer(
            copy.deepcopy(model),
            window=WINDOW,
            num_features=8,
            generator=torch.Generator().manual_seed(0),
        )
    except ValueError as error:
        return Row(name, REFUSED, _one_line(str(error)), f"{modules} modules")
    except Exception as error:
        return Row(name, CRASH, f"conversion: {_describe(error)}", f"{modules} modules")
    blocks = [module for module in converted.modules() if isinstance(module, FavorAttention)]
    called = set()
    for block in blocks:
        block.register_forward_hook(lambda block, *_: called.add(block))
    notes: list[str] = []
    worst = EQUAL
    for label, check in (
        ("forward", _forward),
        ("padding", _padding),
        ("attentions", _attentions),
        ("generate", _generate),
    ):
        status, note = check(model, converted, given)
        if note:
            notes.append(f"{label}: {status}: {note}" if status else f"{label}: {note}")
        if status and _SEVERITY.index(status) > _SEVERITY.index(worst):
            worst = status
    attention = f"{modules} modules, {len(blocks)} converted, {len(called)} called"
    inputs = "+".join(given)
    return Row(name, worst, "; ".join(notes), f"{attention}; {inputs}")


_SEVERITY = (EQUAL, LATE, WRONG, CRASH)
Outcome = tuple[str, str]


def _compare(
    model: Any,
    converted: Any,
    call: Callable[[Any], list[tuple[str, Tensor]]],
    expected: list[tuple[str, Tensor]],
    chosen: Callable[[str, Tensor], Tensor] = lambda place, x: x,
) -> Outcome:
    try:
        actual = call(converted)
    except ValueError as error:
        return LATE, _describe(error)
    except Exception as error:
        return CRASH, _describe(error)
    left = [(place, chosen(place, x)) for place, x in expected]
    right = [(place, chosen(place, x)) for place, x in actual]
    gaps = differences(left, right, TOLERANCE)
    if not gaps:
        return EQUAL, ""
    # A chaotic model turns rounding into as much.
    noise = [(place, chosen(place, x)) for place, x in call(_perturbed(model))]
    random = differences(left, noise, 0.0)
    left_over = {place: gap for place, gap in gaps.items() if gap > random.get(place, 0.0)}
    text = ", ".join(f"{place} {gap:.1e}" for place, gap in list(gaps.items())[:3])
    if not left_over:
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


def _forward(model: Any, converted: Any, given: dict[str, Any]) -> Outcome:
    return _compare(model, converted, lambda m: run(m, given), run(model, given))


def _padding(model: Any, converted: Any, given: dict[str, Any]) -> Outcome:
    """With the end of the last row masked; tokens that are not padding are compared."""
    ids = given.get("input_ids")
    if ids is None or "attention_mask" not in Inputs(model).names or "attention_mask" in given:
        return "", ""
    mask = torch.ones_like(ids)
    mask[-1, -7:] = 0
    masked = {**given, "attention_mask": mask}
    try:
        expected = run(model, masked)
    except Exception as error:
        return "", f"the original does not run: {_describe(error)}"

    def kept(place: str, x: Tensor) -> Tensor:
        return x[mask.bool()] if x.shape[:2] == mask.shape else x[:0]

    return _compare(model, converted, lambda m: run(m, masked), expected, kept)


def _attentions(model: Any, converted: Any, given: dict[str, Any]) -> Outcome:
    """With ``output_attentions``: the same maps, or a refusal."""
    eager = copy.deepcopy(model)
    try:
        eager.set_attn_implementation("eager")
        uncached = {**given, "use_cache": False}
        given = uncached if _runs(eager, uncached) else given
        expected = run(eager, given, output_attentions=True)
    except Exception:
        return "", ""
    if len(expected) == len(run(model, given)):
        return "", ""

    def call(m: Any) -> list[tuple[str, Tensor]]:
        if m is not converted:
            m = copy.deepcopy(m)
            m.set_attn_implementation("eager")
        return run(m, given, output_attentions=True)

    status, note = _compare(model, converted, call, expected)
    if status == LATE:
        return "", f"refused: {note}"
    return status, note


def _generate(model: Any, converted: Any, given: dict[str, Any]) -> Outcome:
    if not hasattr(model, "generate") or not model.can_generate():
        return "", ""
    if not any(getattr(module, "is_causal", False) for module in model.modules()):
        # An encoder under a decoder's head: its tokens see those that come after them.
        return "", ""
    prompt = {key: value for key, value in given.items() if key != "decoder_input_ids"}

    def call(m: Any) -> list[tuple[str, Tensor]]:
        torch.manual_seed(0)
        result = m.generate(
            **copy.deepcopy(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return [
            (place, x)
            for place, x in tensors(result)
            if place.startswith(("sequences", "logits", "[", ""))
        ]

    try:
        expected, again = call(model), call(model)
    except Exception as error:
        return "", f"the original does not: {_describe(error)}"
    if differences(expected, again):
        return "", "the original differs from run to run"
    return _compare(model, converted, call, expected)


def _describe(error: BaseException) -> str:
    """Type, text and innermost place of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    place = ""
    for frame in reversed(frames):
        if "transformers/models" in frame.filename or "/performers/" in frame.filename:
            place = f" ({Path(frame.filename).name}:{frame.lineno} {frame.name})"
            break
    return f"{type(error).__name__}: {_one_line(str(error))[:300]}{place}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------- processes


class Examiner:
    """A process that examines classes one by one, and is started again when one of them kills it.

    Args:
        seconds: Limit for one class.
        memory: Limit of the process's address space in bytes.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = BYTES) -> None:
        self.seconds, self.memory = seconds, memory
        self._process: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def examine(self, name: str, model_type: str, flags: Mapping[str, Any] | None = None) -> Row:
        """The outcome for a class, see `examine`; one that takes too long is not buildable."""
        if self._process is None:
            self._start()
        self._pipe.send((name, model_type, flags))
        if not self._pipe.poll(self.seconds):
            self._stop()
            return Row(
                name, UNBUILT, f"takes more than {self.seconds:.0f} s", seconds=float(self.seconds)
            )
        try:
            row: Row = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            code = self._process.exitcode
            self._stop()
            return Row(name, CRASH, f"the process ended with exit code {code}")
        return row

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.memory), daemon=True)
        self._process.start()
        theirs.close()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = None


def _serve(pipe: multiprocessing.connection.Connection, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    while True:
        try:
            name, model_type, flags = pipe.recv()
        except EOFError:
            return
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            try:
                row = examine(name, model_type, flags)
            except Exception as error:
                row = Row(name, UNBUILT, f"examination: {_describe(error)}")
        pipe.send(row)


def table(rows: Iterable[Row]) -> str:
    """Rows as tab-separated values with a header."""
    names = [field.name for field in dataclasses.fields(Row)]
    lines = ["\t".join(names)]
    for row in rows:
        values = dataclasses.astuple(row)
        lines.append("\t".join(f"{v:.2f}" if isinstance(v, float) else v for v in values))
    return "\n".join(lines) + "\n"


def page(rows: list[Row]) -> str:
    """Rows as a page in Markdown: a count, and the classes of each status and reason."""
    import transformers

    groups: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        # Names of classes, modules and sizes are not the reason.
        reason = re.sub(r"^[\w.]+ \(\w+\) |\b[A-Z]\w+ (?=[a-z])|\([^()]*\)|\d+", "", row.detail)
        reason = "" if row.status in (EQUAL, UNBUILT) else reason.split(":")[0].strip()
        groups[f"{row.status}: {reason}" if reason else row.status].append(row.name)
    counts = collections.Counter(row.status for row in rows)
    lines = [
        "# Classes of transformers",
        "",
        f"Every model class of the auto mappings in transformers {transformers.__version__} that "
        "can be built small: converted with a window that covers the input, its outputs equal the "
        "original's (1e-4; also with padding, and five generated tokens), or `to_performer` "
        "refuses it. Written by",
        "",
        "```",
        "python -m tests.convert.sweep --output classes.tsv --page docs/results/classes.md",
        "```",
        "",
        ", ".join(f"{count} {status}" for status, count in counts.most_common()) + ".",
        "",
        "| outcome | classes |",
        "| --- | --- |",
    ]
    lines += [
        f"| {group.replace('|', '/')} ({len(names)}) | {', '.join(sorted(names))} |"
        for group, names in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="The table (TSV).")
    parser.add_argument("--page", type=Path, help="The table as a page.")
    parser.add_argument("--mappings", default=MAPPINGS, help="Auto mappings.")
    parser.add_argument("--classes", default="", help="Pattern for names of classes.")
    parser.add_argument(
        "--flags",
        action="store_true",
        help="The classes with one flag of their attention changed each time.",
    )
    options = parser.parse_args()
    rows = []
    with Examiner() as examiner:
        for name, model_type in model_classes(options.mappings).items():
            if not re.search(options.classes, name):
                continue
            for flags in attention_flags(CONFIG_MAPPING[model_type]) if options.flags else ({},):
                rows.append(examiner.examine(name, model_type, flags))
                options.output.write_text(table(rows))
    if options.page:
        options.page.write_text(page(rows))
    counts = collections.Counter(row.status for row in rows)
    print(", ".join(f"{count} {status}" for status, count in counts.most_common()))


if __name__ == "__main__":
    main()
