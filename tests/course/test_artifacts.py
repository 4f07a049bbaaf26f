"""Saved models: whole or not there at all, whatever happens while one is written."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.course import artifacts
from common.course.settings import ROOT

DESCRIBED = {"method": "gptq", "settings": {"bits": 4, "sym": False}, "parent": "embedded"}


def writer(value: float):
    """Writes two weight files and a config, as a sharded model would have."""

    def write(path: Path) -> None:
        save_file({"a": torch.full((100,), value)}, path / "model-00001-of-00002.safetensors")
        save_file({"b": torch.full((50,), value)}, path / "model-00002-of-00002.safetensors")
        (path / "config.json").write_text("{}")

    return write


def value_in(folder: Path) -> float:
    return load_file(folder / "model-00001-of-00002.safetensors")["a"][0].item()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "not" / "yet" / "there" / "gptq-w4"


def test_round_trip(folder):
    saved = artifacts.save(folder, writer(1), **DESCRIBED)
    assert artifacts.load(folder) == saved
    assert saved.name == "gptq-w4"
    assert {key: getattr(saved, key) for key in DESCRIBED} == DESCRIBED
    assert value_in(folder) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["gptq-w4"], "nothing else is left behind"


def test_bytes_and_hash_are_those_on_disk(folder):
    saved = artifacts.save(folder, writer(1), **DESCRIBED)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    content = b"".join(file.read_bytes() for file in files)
    assert saved.weight_bytes == len(content)
    assert saved.sha256 == hashlib.sha256(content).hexdigest()
    described = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    assert described == DESCRIBED | {"weight_bytes": len(content), "sha256": saved.sha256}


def test_saving_again_replaces_everything(folder):
    first = artifacts.save(folder, writer(1), **DESCRIBED)
    (folder / "stray.txt").write_text("from before")
    second = artifacts.save(folder, writer(2), **DESCRIBED | {"method": "rtn"})
    assert first.sha256 != second.sha256
    assert artifacts.load(folder) == second
    assert value_in(folder) == 2
    assert not (folder / "stray.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["gptq-w4"]


def test_a_folder_without_weights_is_no_model(folder):
    with pytest.raises(ValueError, match=r"gptq-w4 wrote no \.safetensors file"):
        artifacts.save(folder, lambda path: (path / "config.json").write_text("{}"), **DESCRIBED)
    assert list(folder.parent.iterdir()) == []


# --- interruptions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_previous_artifact(folder, error):
    def fail(path: Path) -> None:
        (path / "model.safetensors").write_bytes(b"half of a fi")
        raise error

    with pytest.raises(error):
        artifacts.save(folder, fail, **DESCRIBED)
    assert list(folder.parent.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        artifacts.load(folder)
    saved = artifacts.save(folder, writer(1), **DESCRIBED)
    assert not (folder / "model.safetensors").exists()
    with pytest.raises(error):
        artifacts.save(folder, fail, **DESCRIBED)
    assert artifacts.load(folder) == saved
    assert value_in(folder) == 1


PRELUDE = """
import os, shutil, signal, sys
from pathlib import Path
from common.course import artifacts

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_call(number, function):
    calls = []
    def replaced(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            die()
        return function(*args, **kwargs)
    return replaced

def write(path):
    (path / "model-00001-of-00002.safetensors").write_bytes(b"of the killed process")
"""


def killed_while_saving(folder: Path, when: str) -> None:
    """Save from another process that gets SIGKILL at the moment that the lines `when` set up."""
    script = PRELUDE + textwrap.dedent(when) + f"\nartifacts.save(Path({str(folder)!r}), write, **{DESCRIBED!r})\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


IN_WRITE = """
def write(path):
    with (path / "model-00001-of-00002.safetensors").open("wb") as file:
        file.write(b"half of a fi")
        file.flush()
        die()
"""
BEFORE_DESCRIPTION = "artifacts._hash = die_at_call(1, artifacts._hash)"
BEFORE_FIRST_RENAME = "Path.rename = die_at_call(1, Path.rename)"
BETWEEN_RENAMES = "Path.rename = die_at_call(2, Path.rename)"
AFTER_RENAMES = """
def replaced(path, ignore_errors=False, remove=shutil.rmtree):
    if path.name.endswith(".old") and path.exists():
        (path / "artifact.json").unlink()  # killed while it removes the previous one
        die()
    remove(path, ignore_errors=ignore_errors)
shutil.rmtree = replaced
"""


@pytest.mark.parametrize("when", [IN_WRITE, BEFORE_DESCRIPTION, BEFORE_FIRST_RENAME], ids=["write", "hash", "rename"])
def test_killed_during_the_first_save(folder, when):
    killed_while_saving(folder, when)
    assert not folder.exists()
    with pytest.raises(FileNotFoundError):
        artifacts.load(folder)
    saved = artifacts.save(folder, writer(2), **DESCRIBED)
    assert artifacts.load(folder) == saved
    assert [path.name for path in folder.parent.iterdir()] == ["gptq-w4"]


@pytest.mark.parametrize(
    "when",
    [IN_WRITE, BEFORE_DESCRIPTION, BEFORE_FIRST_RENAME, BETWEEN_RENAMES],
    ids=["write", "hash", "first rename", "between the renames"],
)
@pytest.mark.parametrize("then", ["load", "save"])
def test_killed_while_replacing(folder, when, then):
    """The previous artifact is there and whole; a later save gets through and tidies up."""
    previous = artifacts.save(folder, writer(1), **DESCRIBED)
    killed_while_saving(folder, when)
    if then == "load":
        assert artifacts.load(folder) == previous
        assert value_in(folder) == 1
    saved = artifacts.save(folder, writer(2), **DESCRIBED)
    assert artifacts.load(folder) == saved
    assert value_in(folder) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["gptq-w4"]


def test_killed_after_both_renames(folder):
    """The new artifact is in place; what is left of the previous one is never taken for one."""
    artifacts.save(folder, writer(1), **DESCRIBED)
    killed_while_saving(folder, AFTER_RENAMES)
    loaded = artifacts.load(folder)
    assert loaded.weight_bytes == len(b"of the killed process")
    saved = artifacts.save(folder, writer(3), **DESCRIBED)
    assert artifacts.load(folder) == saved
    assert [path.name for path in folder.parent.iterdir()] == ["gptq-w4"]


def test_remains_of_a_replaced_artifact_are_not_brought_back(folder):
    """As above; then the folder is deleted, as the message for damaged weights advises. Half a model is none."""
    artifacts.save(folder, writer(1), **DESCRIBED)
    killed_while_saving(folder, AFTER_RENAMES.replace("artifact.json", "config.json"))
    assert artifacts.load(folder).weight_bytes == len(b"of the killed process")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        artifacts.load(folder)


def test_a_writer_that_fails_after_an_interrupted_save(folder):
    """Interrupted between the renames, then a save that fails: still the previous artifact."""
    previous = artifacts.save(folder, writer(1), **DESCRIBED)
    killed_while_saving(folder, BETWEEN_RENAMES)

    def fail(path: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        artifacts.save(folder, fail, **DESCRIBED)
    assert artifacts.load(folder) == previous


# --- refusals ------------------------------------------------------------------------------------------------------


def test_truncated_weights(folder):
    saved = artifacts.save(folder, writer(1), **DESCRIBED)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    size = saved.weight_bytes
    expected = rf"'gptq-w4' is damaged.*{size - 40:,} bytes, {size:,} expected.*run notebook 02-Quantize again"
    with pytest.raises(ValueError, match=expected):
        artifacts.load(folder, made_by="02-Quantize")
    file.unlink()
    with pytest.raises(ValueError, match=r"damaged.*Delete the folder"):
        artifacts.load(folder)


def test_one_changed_bit(folder):
    artifacts.save(folder, writer(1), **DESCRIBED)
    file = folder / "model-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"'gptq-w4' is damaged.*SHA-256 differs.*run notebook 02-Quantize again"):
        artifacts.load(folder, made_by="02-Quantize")


def test_weights_are_read_once_per_process_and_again_when_they_change(folder, monkeypatch):
    artifacts.save(folder, writer(1), **DESCRIBED)
    read = []
    monkeypatch.setattr(artifacts, "_hash", lambda files, real=artifacts._hash: read.append(files) or real(files))
    first = artifacts.load(folder)
    assert artifacts.load(folder) == first
    assert len(read) == 1
    artifacts.save(folder, writer(2), **DESCRIBED)
    saved = len(read)
    assert artifacts.load(folder).sha256 != first.sha256
    assert len(read) == saved + 1


def test_a_missing_artifact_names_the_notebook(folder):
    with pytest.raises(FileNotFoundError, match=r"no saved model 'gptq-w4'.*Run notebook Lab-3\.1/02-Quantize first"):
        artifacts.load(folder, made_by="Lab-3.1/02-Quantize")
    folder.mkdir(parents=True)  # such as a folder of someone else
    with pytest.raises(FileNotFoundError, match="no saved model"):
        artifacts.load(folder)


def test_disk_full(folder, monkeypatch):
    previous = artifacts.save(folder, writer(1), **DESCRIBED)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000_000))
    written = []
    with pytest.raises(OSError, match=r"gptq-w4 takes 3\.50 GB and the disk has 2\.00 GB free.*Free some space"):
        artifacts.save(folder, written.append, **DESCRIBED, expected_bytes=3_500_000_000)
    assert written == [], "refused before anything is written"
    assert artifacts.load(folder) == previous
    artifacts.save(folder, writer(2), **DESCRIBED, expected_bytes=1_000_000_000)
    assert value_in(folder) == 2
