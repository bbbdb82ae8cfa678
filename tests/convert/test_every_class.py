"""Every model class of transformers is converted to equal outputs, or refused at the conversion.

The classes that can be built small run in the slow tests.
"""

import pytest

from tests.convert import examination
from tests.convert.examination import BROKEN, EQUAL, REFUSED, SECONDS, UNBUILT, WRONG, examine
from tests.convert.small_models import model_classes
from tests.convert.sweep import MAPPINGS, Examiner

BASES = model_classes(r"^MODEL_MAPPING_NAMES$")
CLASSES = model_classes(MAPPINGS)


@pytest.fixture(scope="session")
def rows():
    """Outcomes so far."""
    return {}


@pytest.fixture(scope="session")
def examiner():
    with Examiner() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_converted_class_is_equal_or_refused(name, examiner, rows):
    row = rows[name] = examiner.examine(name, CLASSES[name])
    if row.status == UNBUILT:
        pytest.skip(row.detail)
    assert row.status not in BROKEN, f"{row.status}: {row.detail}"


@pytest.mark.slow
def test_most_classes_can_be_built_small(rows):
    seen = [rows[name] for name in BASES if name in rows]
    if len(seen) < len(BASES):
        pytest.skip("not all classes were examined by this process")
    # What cannot be built lacks a library, or inputs that a signature does not tell.
    assert sum(row.status != UNBUILT for row in seen) > 0.85 * len(seen)


def test_examination_tells_equal_outputs_from_a_refusal():
    row = examine("LlamaForCausalLM", "llama")
    assert row.status == EQUAL, row.detail
    assert "2 converted, 2 called" in row.attention
    row = examine("T5Model", "t5")
    assert row.status == REFUSED
    # transformers 5.10 computes T5's attention beside the interface.
    assert "position bias" in row.detail or "has no attention to convert" in row.detail


@pytest.mark.parametrize("name", ["BertModel", "GPT2LMHeadModel"])
def test_examination_notices_a_window_that_does_not_cover(name, monkeypatch):
    monkeypatch.setattr(examination, "WINDOW", 1)
    row = examine(name, CLASSES[name])
    assert row.status == WRONG
    checks = ["forward", "padding", "attentions"] + ["generate"] * name.endswith("HeadModel")
    assert all(f"{check}: wrong" in row.detail for check in checks), row.detail


@pytest.mark.slow
def test_class_that_takes_too_long_ends_only_its_process():
    with Examiner() as examiner:
        examiner.seconds = 0.01
        assert examiner.examine("BertModel", "bert").status == UNBUILT
        examiner.seconds = SECONDS
        assert examiner.examine("BertModel", "bert").status == EQUAL
