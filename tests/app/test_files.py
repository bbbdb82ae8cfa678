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


def test_a_file_is_not_a_folder(tmp_path):
    place = tmp_path / "file"
    place.write_text("kept")
    with pytest.raises(UserError, match=r"^--output .*file is a file; give a folder$"):
        prepare_output_folder(place)
    assert place.read_text() == "kept"


def test_a_folder_with_content_needs_resume(tmp_path):
    """Of which a command that cannot resume does not speak."""
    (tmp_path / "x").write_text("kept")
    with pytest.raises(UserError, match="not empty; give another folder, or --resume"):
        prepare_output_folder(tmp_path, resume=False)
    with pytest.raises(UserError, match=r"not empty; give another folder$"):
        prepare_output_folder(tmp_path)
    assert prepare_output_folder(tmp_path, resume=True) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_below_a_file_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .* cannot be written \(Not a directory\)"):
        prepare_output_folder(tmp_path / "file" / "folder")
    with pytest.raises(UserError, match=r"--output .* cannot be written \(.*/file is not a folder"):
        prepare_output_file(tmp_path / "file" / "x.npz", (".npz",))


def test_only_the_first_of_several_processes_checks(tmp_path, monkeypatch):
    (tmp_path / "written-by-the-first").touch()
    monkeypatch.setenv("RANK", "1")
    assert prepare_output_folder(tmp_path) == tmp_path
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="not empty"):
        prepare_output_folder(tmp_path)


def test_a_file_needs_one_of_the_suffixes(tmp_path):
    with pytest.raises(UserError, match=r"x\.csv must end with \.npz or \.parquet"):
        prepare_output_file(tmp_path / "x.csv", (".npz", ".parquet"))
    path = tmp_path / "new" / "x.NPZ"
    assert prepare_output_file(path, (".npz", ".parquet")) == path
    assert list(path.parent.iterdir()) == []


def test_a_name_that_leaves_no_room_for_the_temporary_file(tmp_path):
    path = tmp_path / f"{250 * 'x'}.tsv"
    with pytest.raises(UserError, match="cannot be written"):
        prepare_output_file(path, (".tsv",))


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(UserError, match="is a folder; give a file"):
        prepare_output_file(tmp_path / "x.npz", (".npz",))


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
