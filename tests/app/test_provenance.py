"""Origin of results."""

import hashlib
import json
import sys
from datetime import datetime, timedelta, timezone
from importlib import metadata

import pytest

from performers.app.provenance import provenance, weights_sha256, write_result


def test_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/performers", "embed", "my proteins.fasta"])
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_result(tmp_path / "x.json", {"a": 1}, "probe", seed=3, model=tmp_path)
    content = json.loads((tmp_path / "x.json").read_text())
    found = content.pop("provenance")
    assert content == {"a": 1}
    assert found["schema"] == "performers/probe/1"
    assert found["command"] == "performers embed 'my proteins.fasta'"
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["seed"] == 3
    digest = hashlib.sha256(b"weights").hexdigest()
    assert found["model"] == {"path": str(tmp_path), "sha256": digest}
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])
    assert timedelta(0) <= age < timedelta(minutes=1)


@pytest.mark.parametrize(
    "names",
    [
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["pytorch_model.bin"],
        ["model.gguf"],
    ],
)
def test_weights_in_several_files_and_other_formats(names, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    first = weights_sha256(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert weights_sha256(tmp_path) == first
    for name in names:
        (tmp_path / name).write_bytes(b"other weights")
        assert weights_sha256(tmp_path) not in (None, first)
        (tmp_path / name).write_bytes(b"weights")
    assert weights_sha256(tmp_path) == first


def test_a_file_of_weights(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    assert weights_sha256(path) == hashlib.sha256(b"weights").hexdigest()


def test_changed_weights_have_another_hash(tmp_path):
    hashes = []
    for content in (b"one", b"three"):
        (tmp_path / "model.safetensors").write_bytes(content)
        hashes.append(provenance("x", model=tmp_path)["model"]["sha256"])
    assert hashes[0] != hashes[1]
    assert provenance("x", model=tmp_path / "none")["model"]["sha256"] is None
    assert provenance("x").keys() == {"schema", "date", "command", "versions"}
