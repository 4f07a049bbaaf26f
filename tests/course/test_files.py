"""Files and folders: whole or not there at all (`test_artifacts` kills a process while it replaces a folder)."""

import pytest

from common.course.files import whole_file, whole_folder, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_previous_file_or_none(tmp_path, error):
    file = tmp_path / "new" / "a.json"

    def interrupted():
        with pytest.raises(error), whole_file(file) as new:
            new.write_text("half of a fi")
            raise error

    interrupted()
    assert names(file.parent) == []
    write_whole(file, "整份")
    assert file.read_text(encoding="utf-8") == "整份"
    interrupted()
    assert file.read_text(encoding="utf-8") == "整份"
    assert names(file.parent) == ["a.json"]


def test_files_of_one_stem_do_not_meet(tmp_path):
    with whole_file(tmp_path / "a.json") as first, whole_file(tmp_path / "a.bin") as second:
        first.write_text("text")
        second.write_bytes(b"bytes")
    assert (tmp_path / "a.json").read_text() == "text"
    assert (tmp_path / "a.bin").read_bytes() == b"bytes"


def test_a_block_that_writes_nothing_replaces_nothing(tmp_path):
    write_whole(tmp_path / "a", "before")
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "before"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_previous_folder_or_none(tmp_path, error):
    folder = tmp_path / "models" / "a"

    def interrupted():
        with pytest.raises(error), whole_folder(folder) as new:
            (new / "half").touch()
            raise error

    interrupted()
    assert names(folder.parent) == []
    with whole_folder(folder) as new:
        (new / "whole").touch()
    interrupted()
    assert names(folder.parent) == ["a"]
    assert names(folder) == ["whole"]


def test_a_replaced_folder_keeps_no_file_of_the_previous_one(tmp_path):
    for name in ("first", "second"):
        with whole_folder(tmp_path / "a") as new:
            (new / name).touch()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["second"]
