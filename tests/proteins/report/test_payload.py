"""Proteins and maps in the form in which the page carries them, decoded again."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.analysis import ModelAnalysis
from performers.proteins.reading.residues import ProteinReading
from performers.proteins.report.payload import (
    LEVELS,
    UNKNOWN,
    grouped,
    header_labels,
    heads,
    track,
    tracked,
)


def reading(name, sequence, description="", seed=0):
    generator = np.random.default_rng(seed)
    length = len(sequence)
    return ProteinReading(
        ProteinRecord(name, description, sequence),
        generator.uniform(size=length).astype(np.float32) ** 3,
        generator.integers(0, 20, (length, 3)),
        generator.uniform(size=(length, 3)).astype(np.float32) ** 4,
        generator.normal(size=5).astype(np.float32),
    )


def decoded(text):
    last = len(LEVELS) - 1
    return np.array([np.nan if c == UNKNOWN else (LEVELS.index(c) / last) ** 2 for c in text])


def analysis(maps, **fields):
    length = maps[0].shape[1]
    protein = ProteinRecord("p", "", "A" * length)
    return ModelAnalysis(
        *(protein, 1, 1, 0, 256, np.eye(20)), labels="A" * length, maps=tuple(maps), **fields
    )


def test_guesses_come_back_to_a_percentage_point():
    given = reading("p", "MKTAYIAKQR")
    given.probability[3] = np.nan
    packed = track(given)
    np.testing.assert_allclose(decoded(packed["own"]), given.probability, atol=0.012)
    shares = decoded(packed["shares"]).reshape(-1, 3)
    np.testing.assert_allclose(shares, given.substitute_probability, atol=0.012)
    assert packed["others"] == "".join(AMINO_ACIDS[i] for i in given.substitutes.ravel())
    assert not set(LEVELS + UNKNOWN) & set("\"<>&\\'") - {"'"}
    assert UNKNOWN not in LEVELS


def test_the_named_protein_and_then_what_fits_is_kept():
    readings = [reading(f"p{n}", "A" * length) for n, length in enumerate((40, 50, 5, 30))]
    assert tracked(readings, "p1", 60) == [1, 2]
    assert tracked(readings, "p9", 60) == [0, 2]
    assert tracked(readings, "p0", 10**6) == [0, 1, 2, 3]
    assert tracked(readings, "p0", 1) == []


def test_labels_are_read_from_headers_and_rare_ones_joined():
    def named(*descriptions):
        return header_labels([ProteinRecord("p", text, "M") for text in descriptions])

    assert named(
        "Kinase OS=Homo sapiens OX=9606 sites=1", "x OS=Mus musculus OX=10090", "y OS=Mus musculus"
    ) == {
        "OS": ["Homo sapiens", "Mus musculus", "Mus musculus"],
        "OX": ["9606", "10090", "none"],
    }
    assert named("a=1", "a=1", "a=1") == {}, "tells none apart"
    assert named("a=1", "a=2", "a=3") == {}, "a name rather than a label"
    assert named("a=1", "a=2", "", "", "") == {}, "most have none"
    values = [str(n // 2) for n in range(20)]
    assert set(grouped(values)) == {*"012345", "other"}


@pytest.mark.parametrize(("room", "step"), [(10**7, 1), (4_000, None)])
def test_attention_maps_come_back_within_their_rounding(room, step):
    generator = np.random.default_rng(1)
    maps = [generator.dirichlet(np.full(60, 0.2), size=(2, 60)).astype(np.float32)]
    maps[0][0, 0, 0] = np.nan
    packed = heads(analysis(maps), room)
    assert sum(len(head["image"]) for head in packed["heads"]) <= room
    assert (packed["step"] == 1) is (step == 1)
    bins = np.arange(60) // packed["step"]
    for head, weights in zip(packed["heads"], maps[0], strict=True):
        weights = np.nan_to_num(weights)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(head["image"]))), float)
        found = head["max"] * (pixels / 255) ** 2
        for row, column in ((0, 1), (3, 2)):
            cell = weights[np.ix_(bins == row, bins == column)].mean()
            assert found[row, column] == pytest.approx(cell, abs=head["max"] * 0.005 + 1e-6)
    even, sharp = np.full((1, 60, 60), 1 / 60), np.eye(60)[None]
    limits = [head["limit"] for head in heads(analysis([even, sharp]), 10**7)["heads"]]
    assert limits == pytest.approx([10 / 60, 1.0], rel=1e-3), "an even head is pale"
