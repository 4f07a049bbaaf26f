"""Records, tables and provenance."""

import nbformat
import pytest

from common import provenance, results, tables
from common.settings import load_settings

SPEC = {
    "title": "品質",
    "lab": "quantization",
    "notebook": "03-Inference",
    "head": "模型",
    "columns": {"perplexity": {"title": "困惑度", "format": "{:.2f} ± {spread:.2f}"}},
    "rows": {"original": "原始", "gptq": "GPTQ"},
}


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    return results.Recorder(load_settings("quantization", "cpu"), "03-Inference")


def perplexity(recorder, artifact, value, **protocol):
    recorder.record(
        "perplexity", value, "ppl", artifact=artifact, protocol={"windows": 48} | protocol, n=48, spread=0.5
    )


def test_protocol_hash_ignores_order_and_sees_values():
    assert results.protocol_hash({"a": 1, "b": 2}) == results.protocol_hash({"b": 2, "a": 1})
    assert results.protocol_hash({"a": 1}) != results.protocol_hash({"a": 2})


def test_measuring_again_replaces(recorder):
    perplexity(recorder, "gptq", 15.0)
    perplexity(recorder, "gptq", 14.0)
    assert [r["value"] for r in results.read(recorder.file)] == [14.0]


def test_table_shows_values_with_spread_and_device(recorder):
    perplexity(recorder, "original", 12.66)
    perplexity(recorder, "gptq", 14.14)
    table = tables.render_table(SPEC, results.read(recorder.file))
    assert f"困惑度（{recorder.device}）" in table
    assert "| 原始 | 12.66 ± 0.50 |" in table
    assert "| GPTQ | 14.14 ± 0.50 |" in table


def test_table_refuses_to_mix_protocols(recorder):
    perplexity(recorder, "original", 12.66)
    perplexity(recorder, "gptq", 14.14, windows=8)
    with pytest.raises(ValueError, match="mixes protocols"):
        tables.render_table(SPEC, results.read(recorder.file))


def test_promote_replaces_a_notebooks_old_figures(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "COMMITTED", tmp_path / "committed")
    perplexity(recorder, "gptq", 14.0)
    tables.promote("03-Inference", recorder.file)
    recorder.file.unlink()
    perplexity(recorder, "original", 12.0)
    tables.promote("03-Inference", recorder.file)
    assert [(r["artifact"], r["value"]) for r in tables.committed()] == [("original", 12.0)]
    with pytest.raises(ValueError, match="no record of notebook 01-Setup"):
        tables.promote("01-Setup", recorder.file)


def test_render_fills_regions_and_check_writes_nothing(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "COMMITTED", tmp_path / "committed")
    specs = tmp_path / "tables.toml"
    specs.write_text(
        '[quality]\ntitle="t"\nlab="quantization"\nhead="h"\n[quality.columns.perplexity]\ntitle="p"\n'
        'format="{:.1f}"\n[quality.rows]\ngptq="GPTQ"\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(tables, "TABLES", specs)
    perplexity(recorder, "gptq", 14.0)
    tables.promote("03-Inference", recorder.file)
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- results:quality -->\nold\n<!-- /results -->\nafter\n", encoding="utf-8")
    before = document.read_text(encoding="utf-8")
    assert tables.render([document], check=True) == [document]
    assert document.read_text(encoding="utf-8") == before
    tables.render([document])
    text = document.read_text(encoding="utf-8")
    assert "| GPTQ | 14.0 |" in text
    assert "old" not in text
    assert text.endswith("after\n")
    assert tables.render([document]) == []


def notebook(*sources):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_provenance_notices_a_changed_cell_but_not_a_changed_output():
    book = notebook("from common.text import load_corpus\nx = 1")
    assert provenance.stale(book) == "it has no recorded run"
    provenance.stamp(book, "quantization", "cpu", "CPU 2 cores", "2026-11-23")
    assert provenance.stale(book) == ""
    book.cells[0].outputs = [nbformat.v4.new_output("stream", text="1")]
    assert provenance.stale(book) == ""
    book.cells[0].source += "\nx = 2"
    assert "cells" in provenance.stale(book)


def test_provenance_follows_imports_and_ignores_comments(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text('"""Doc."""\nfrom common.b import f\n\n\ndef g():\n    """Doc."""\n    return f()\n')
    (tmp_path / "b.py").write_text("def f():\n    return 1\n")
    (tmp_path / "c.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    book = notebook("from common.a import g")
    provenance.stamp(book, "quantization", "cpu", "d", "2026-11-23")
    (tmp_path / "c.py").write_text("x = 2\n")  # not imported
    (tmp_path / "a.py").write_text("from common.b import f\n\n\ndef g():\n    # why\n    return f()\n")
    assert provenance.stale(book) == ""
    (tmp_path / "b.py").write_text("def f():\n    return 2\n")
    assert "common" in provenance.stale(book)
