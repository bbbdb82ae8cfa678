"""Origin of results."""

import hashlib
import json
import sys
from datetime import datetime, timedelta, timezone
from importlib import metadata

from performers.app.provenance import provenance, write_result


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


def test_changed_weights_have_another_hash(tmp_path):
    hashes = []
    for content in (b"one", b"three"):
        (tmp_path / "model.safetensors").write_bytes(content)
        hashes.append(provenance("x", model=tmp_path)["model"]["sha256"])
    assert hashes[0] != hashes[1]
    assert provenance("x", model=tmp_path / "none")["model"]["sha256"] is None
    assert provenance("x").keys() == {"schema", "date", "command", "versions"}
