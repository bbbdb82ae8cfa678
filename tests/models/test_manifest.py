"""Manifests: a listed file that changed or is gone is named; anything else is left alone."""

import json
import os

import pytest

from performers.models.manifest import check_manifest, find_damage, write_manifest


@pytest.fixture
def folder(tmp_path):
    """A folder with shards, a subfolder, hidden files and a file too large for one read."""
    saved = tmp_path / ".saving" / "model"
    (saved / "parts").mkdir(parents=True)
    (saved / ".cache").mkdir()
    (saved / "config.json").write_text("{}")
    (saved / "model-1.safetensors").write_bytes(bytes(range(256)) * 8200)
    (saved / "parts" / "model-2.safetensors").write_bytes(b"b")
    (saved / ".hidden").write_text("no")
    (saved / ".cache" / "file").write_text("no")
    os.mkfifo(saved / "pipe")
    write_manifest(saved)
    return saved


def entries(folder):
    return json.loads((folder / "manifest.json").read_text())["files"]


def refusal(folder):
    with pytest.raises(
        ValueError, match=r"; restore it from a copy, or delete manifest.json "
    ) as e:
        check_manifest(folder)
    text = str(e.value)
    assert text.startswith(f"{folder}: ")
    assert "\n" not in text
    return text[len(f"{folder}: ") :]


FILES = ["config.json", "model-1.safetensors", "parts/model-2.safetensors"]


def test_regular_files_are_listed_with_size_and_hash(folder):
    """Also when the manifest is written again; the others may come, change and go."""
    for _ in range(2):
        assert list(entries(folder)) == FILES
        assert entries(folder)["config.json"] == {
            "size": 2,
            "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        }
        assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
        write_manifest(folder)
    (folder / "README.md").write_text("mine")
    (folder / ".hidden").unlink()
    (folder / "pipe").unlink()
    check_manifest(folder)


def test_a_folder_without_a_manifest_passes(folder):
    (folder / "config.json").write_text("[]")
    assert "config.json" in refusal(folder)
    (folder / "manifest.json").unlink()
    check_manifest(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_listed_file_that_changed_is_named(folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert refusal(folder).startswith(f"{name} does not match its SHA-256 in manifest.json; ")
    path.write_bytes(content[:-1])
    size = len(content)
    assert refusal(folder).startswith(f"{name} has {size - 1:,} bytes, expected {size:,}; ")
    path.unlink()
    assert refusal(folder).startswith(f"{name} is missing; ")


def test_a_listed_file_that_is_no_file_is_not_opened(folder):
    path = folder / "config.json"
    path.unlink()
    os.mkfifo(path)
    assert refusal(folder).startswith("config.json is not a regular file; ")
    path.unlink()
    path.mkdir()
    assert refusal(folder).startswith("config.json is not a regular file; ")


def test_links_to_files_count_as_files(folder, tmp_path):
    blob = tmp_path / "blob"
    (folder / "config.json").rename(blob)
    (folder / "config.json").symlink_to(blob)
    check_manifest(folder)
    blob.unlink()
    assert find_damage(folder) == "config.json is missing"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *((x, "cannot be read as JSON") for x in (b"", b"\0" * 9, b"\xff{}", b"[" * 100_000)),
        (b"[]", "has schema None, expected 1"),
        (b"{}", "has schema None, expected 1"),
        (b'{"schema": 2, "files": {}}', "has schema 2, expected 1"),
        *(
            (b'{"schema": 1%s}' % files, "does not give the size and SHA-256")
            for files in (
                b"",
                b', "files": []',
                b', "files": {"config.json": 2}',
                b', "files": {"config.json": {}}',
                b', "files": {"config.json": {"size": "2", "sha256": ""}}',
            )
        ),
    ],
)
def test_a_damaged_manifest_is_refused(folder, content, reason):
    (folder / "manifest.json").write_bytes(content)
    assert refusal(folder).startswith(f"manifest.json {reason}")


def test_a_manifest_that_is_no_file_is_not_opened(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert refusal(folder).startswith("manifest.json is not a regular file; ")
