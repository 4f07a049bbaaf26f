"""The 7B run: its table in the chapter, its records by model, and the script that makes it."""

import importlib.util
import json
import sys
import tarfile

import pytest

from common.course.settings import ROOT
from common.measure import results
from tools import by_model, large

ROW = {"state": "done", "seconds": 61.2, "card": 13.2, "resident": 27.0, "anonymous": 13.9, "side_by_side": True}


def test_the_table_says_what_fits_which_card(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "FILE", tmp_path / "large.json")
    assert "尚無紀錄" in large.table()
    rows = [ROW | {"notebook": "3.1-01"}, ROW | {"notebook": "3.1-02", "card": 6.5, "side_by_side": False}]
    rows += [ROW | {"notebook": "3.1-04", "state": "failed", "card": None}]
    run = {"device": "Some GPU", "date": "2026-12-01", "limit": 15, "rows": rows}
    large.FILE.write_text(json.dumps(run), encoding="utf-8")
    text = large.table()
    assert "| Lab 3.1 · 01 | 61＊ | 13.2 | 27.0 | 13.9 |" in text and "| Lab 3.1 · 02 | 61 | 6.5 |" in text
    assert "- 8 GB：3.1 · 02\n- 12 GB：3.1 · 02\n- 16 GB：全部\n- 24 GB：全部\n" in text
    assert "沒有跑完的：3.1 · 04" in text


def test_records_are_filed_by_model(tmp_path):
    record = {"lab": "pruning", "notebook": "01", "key": "k", "artifact": "a", "profile": "gpu16", "device": "d"}
    record["protocol"] = {}
    both = [record | {"model": model, "value": 1.0} for model in ("meta-llama/Llama-2-7b-hf", "Qwen/Qwen3-0.6B")]
    results.write(both, tmp_path / "results" / "d" / "gpu16" / "pruning.json")
    by_model.main([str(tmp_path / "results"), str(tmp_path / "filed")])
    (llama,) = results.read(tmp_path / "filed" / "meta-llama-llama-2-7b-hf" / "d" / "gpu16" / "pruning.json")
    (qwen,) = results.read(tmp_path / "filed" / "qwen-qwen3-0.6b" / "d" / "gpu16" / "pruning.json")
    assert (llama, qwen) == tuple(both)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script with another program in the place of `tools.run`: it fails for 3.2-02 and sleeps for 3.3-01."""
    spec = importlib.util.spec_from_file_location("recording_large", ROOT / "tools" / "recording" / "large.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    monkeypatch.setenv("HOST", str(tmp_path / "host"))
    monkeypatch.setattr(module.Session, "stand_in", lambda self, shape: self.models / shape)
    code = (
        "import sys, time\n"
        "lab, number = (sys.argv[sys.argv.index(name) + 1] for name in ('--lab', '--notebook'))\n"
        "time.sleep(20 if (lab, number) == ('3.3', '01') else 0); sys.exit((lab, number) == ('3.2', '02'))"
    )
    usual = module.subprocess.Popen

    def fake(command, **options):
        return usual([sys.executable, "-c", code, *command[3:]], **options)

    monkeypatch.setattr(module.subprocess, "Popen", fake)
    return module


def test_the_script_goes_on_where_it_can_and_leaves_a_table(script, tmp_path):
    assert script.main(["14", str(tmp_path / "out"), "--small"]) == 1
    run = json.loads((tmp_path / "out" / "large.json").read_text(encoding="utf-8"))
    states = {row["notebook"]: row["state"] for row in run["rows"]}
    assert [states.get(f"3.1-0{n}") for n in (1, 2, 3)] == ["done"] * 3
    assert states["3.2-02"] == "failed" and "3.2-03" not in states, "what needs it is not run"
    assert states["3.3-01"] == "out of time" and "3.3-02" not in states
    assert "| 3.2-02 | failed |" in (tmp_path / "out" / "large.md").read_text(encoding="utf-8")
    with tarfile.open(tmp_path / "out" / "large.tar.gz") as packed:
        assert "logs/3.2-02.log" in packed.getnames()
    again = script.Session(script.argparse.Namespace(seconds=5, out=tmp_path / "out", small=True, alone=False))
    assert [row.state for row in again.rows if row.notebook == "3.1-01"] == ["done"], "a second call knows the first"
