"""Output folders and files: refused before the work, written whole or not at all."""

import pytest

from performers.app.errors import UserError
from performers.app.files import (
    prepare_output_file,
    prepare_output_folder,
    read_json,
    write_json,
)


def test_a_folder_is_made_with_its_parents_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    assert prepare_output_folder(folder) == folder
    assert list(folder.iterdir()) == []
    prepare_output_folder(folder)


@pytest.mark.parametrize(
    ("name", "resume", "message"),
    [
        ("file", None, r"^--output .*file is a file; give a folder$"),
        # A command that cannot resume does not speak of it.
        ("full", None, r"full is not empty; give another folder$"),
        ("full", False, r"full is not empty; give another folder, or --resume"),
        ("file/below", None, r"^--output .*below cannot be written \(Not a directory\)"),
    ],
)
def test_folders_that_are_refused(tmp_path, name, resume, message):
    (tmp_path / "full" / "x").mkdir(parents=True)
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        prepare_output_folder(tmp_path / name, resume=resume)
    assert prepare_output_folder(tmp_path / "full", resume=True) == tmp_path / "full"
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.csv", r"^--output .*x\.csv must end with \.npz or \.parquet"),
        ("folder.npz", "is a folder; give a file"),
        ("file/x.npz", r"cannot be written \(.*/file is not a folder"),
        # It leaves no room for the name of the temporary file.
        (f"{250 * 'x'}.npz", "cannot be written"),
    ],
)
def test_files_that_are_refused(tmp_path, name, message):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        prepare_output_file(tmp_path / name, (".npz", ".parquet"))
    path = tmp_path / "new" / "x.NPZ"
    assert prepare_output_file(path, (".npz", ".parquet")) == path
    assert list(path.parent.iterdir()) == []


def test_only_the_first_of_several_processes_checks(tmp_path, monkeypatch):
    (tmp_path / "written-by-the-first").touch()
    monkeypatch.setenv("RANK", "1")
    assert prepare_output_folder(tmp_path) == tmp_path
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="not empty"):
        prepare_output_folder(tmp_path)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": 1})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("performers.app.files.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"not json"])
def test_what_is_not_json_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"x\.json does not exist"):
        read_json(path)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json cannot be read as JSON: "):
        read_json(path)
