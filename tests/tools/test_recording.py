"""What comes back from an air-gapped host becomes the committed notebooks and figures."""

import json
import shutil
import subprocess
import sys
import tarfile

import pytest

from common.course.settings import CHAPTER, ROOT
from tools import tables

sys.path.insert(0, str(ROOT / "tools" / "recording"))
import merge

NOTEBOOK = CHAPTER / "Lab-3.2-Pruning" / "01-Setup.ipynb"
RECORD = {"lab": "pruning", "notebook": "01-Setup", "key": "seconds", "artifact": "a", "model": "embedded"}
RECORD |= {"profile": "gpu", "device": "Some GPU", "protocol": {}, "value": 1.0}


@pytest.fixture
def archive(tmp_path):
    def make(records):
        notebook = tmp_path / "recorded" / NOTEBOOK.relative_to(ROOT)
        notebook.parent.mkdir(parents=True)
        shutil.copy(NOTEBOOK, notebook)
        figures = tmp_path / "work" / "results" / "some-gpu" / "gpu" / "pruning.json"
        figures.parent.mkdir(parents=True)
        figures.write_text(json.dumps(records), encoding="utf-8")
        with tarfile.open(tmp_path / "recorded.tar.gz", "w:gz") as packed:
            for name in ("recorded", "work"):
                packed.add(tmp_path / name, name)
        return tmp_path / "recorded.tar.gz"

    return make


def test_notebooks_and_their_figures_come_home(archive, tmp_path, monkeypatch):
    (tmp_path / "chapter" / NOTEBOOK.parent.name).mkdir(parents=True)
    monkeypatch.setattr(merge, "CHAPTER", tmp_path / "chapter")
    monkeypatch.setattr(tables, "COMMITTED", tmp_path / "committed")
    assert merge.merge(archive([RECORD, RECORD | {"notebook": "02-Prune"}])) == ["Lab-3.2-Pruning/01-Setup.ipynb"]
    home = tmp_path / "chapter" / NOTEBOOK.parent.name / NOTEBOOK.name
    assert home.read_bytes() == NOTEBOOK.read_bytes()
    (file,) = (tmp_path / "committed").glob("*/pruning.json")
    assert [r["notebook"] for r in json.loads(file.read_text(encoding="utf-8"))] == ["01-Setup"]


def test_a_notebook_without_figures_stays_away(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "CHAPTER", tmp_path / "chapter")
    with pytest.raises(FileNotFoundError, match="01-Setup: 0 files hold its figures"):
        merge.merge(archive([]))


def test_recording_stops_before_what_does_not_fit(tmp_path):
    """No notebook is begun that the time left cannot hold."""
    command = ["bash", "tools/recording/record.sh", "10", str(tmp_path / "out"), "3.1-01:60"]
    done = subprocess.run(command, cwd=ROOT, env={"HOST": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True)
    assert done.stdout.decode() == "3.1-01: 10 s are too few\n"


def test_every_row_that_fits_is_measured_once(tmp_path):
    """Two workers share the rows; none begins what the time left cannot hold."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python3"
    stub.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $*" >> {tmp_path}/calls\n', encoding="utf-8")
    stub.chmod(0o755)
    command = ["bash", "tools/recording/bench.sh", "60", str(tmp_path / "out"), "kd-step/ours, stored labels:20"]
    command += ["nf4/bitsandbytes:20", "gptq-w4/GPTQModel:90", "int8/bitsandbytes:20"]
    environment = {"HOST": str(tmp_path), "CARDS": "2", "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    measured = sorted(call.partition("--only ")[2] for call in calls)
    assert measured == [
        "int8/bitsandbytes",
        "kd-step/ours, stored labels",
        "nf4/bitsandbytes",
        "original",
        "original --record",
    ]
    assert (tmp_path / "out" / "bench.tar.gz").exists()
