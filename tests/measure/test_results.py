"""Records, tables and provenance."""

from pathlib import Path

import pytest

from common.course.environment import Usage
from common.course.settings import load_settings
from common.measure import results
from common.measure.benchmarking import Latency
from common.measure.evaluation import Baseline, compare, evaluate
from tools import tables

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
    return results.Recorder(load_settings("quantization", "cpu").replace(notebook="03-Inference"))


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
    assert table.startswith(f"**{recorder.device}**：{SPEC['title']}。\n\n| 模型 | 困惑度 |")
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


def test_a_run_begins_without_its_own_old_figures_and_keeps_those_of_others(recorder):
    perplexity(recorder, "gptq", 14.0)
    settings = load_settings("quantization", "cpu")
    for other in (
        results.Recorder(settings.replace(notebook="02-Quantize")),
        results.Recorder(settings.replace(model="a/b", notebook="03-Inference")),
    ):
        perplexity(other, "gptq", 13.0)
    results.Recorder(settings.replace(notebook="03-Inference"))
    left = [(r["notebook"], r["model"]) for r in results.read(recorder.file)]
    assert left == [("02-Quantize", "embedded"), ("03-Inference", "a/b")]


@pytest.mark.parametrize("change", [{"model": "a/b"}, {"profile": "gpu"}, {"device": "another"}, {"protocol": {}}])
def test_figures_of_another_model_profile_device_or_protocol_do_not_replace(recorder, change):
    perplexity(recorder, "gptq", 14.0)
    (record,) = results.read(recorder.file)
    results.merge([record | change | {"value": 15.0}], recorder.file)
    assert sorted(r["value"] for r in results.read(recorder.file)) == [14.0, 15.0]


def test_quality_is_stored_with_the_windows_it_was_measured_on(recorder, llama, windows):
    """KL and top-1 may see fewer windows than the perplexity, and say so."""
    few, baseline = len(windows) - 2, Baseline(len(windows) - 2)
    original = evaluate(llama, windows, keep=baseline)
    llama.model.norm.weight.data *= 1.1
    recorder.quality(evaluate(llama, windows, against=baseline), artifact="gptq")
    stored = {r["key"]: r for r in results.read(recorder.file)}
    assert {key: (r["n"], r["protocol"]["windows"]) for key, r in stored.items()} == {
        "perplexity": (few + 2, few + 2),
        "kl": (few, few),
        "top1": (few, few),
    }
    assert [r["protocol"].get("against") for r in stored.values()].count("original") == 2
    recorder.quality(original, artifact="original")
    assert [r["key"] for r in results.read(recorder.file) if r["artifact"] == "original"] == ["perplexity"]


def test_an_interrupted_write_loses_no_figure(recorder, monkeypatch):
    perplexity(recorder, "gptq", 14.0)
    write = Path.write_text

    def half(path, text, **options):
        write(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        perplexity(recorder, "original", 12.0)
    assert [r["value"] for r in results.read(recorder.file)] == [14.0]


@pytest.mark.parametrize("change", [{"model": "a/b"}, {"profile": "gpu"}])
def test_table_refuses_to_mix_models_and_profiles(recorder, change):
    perplexity(recorder, "original", 12.66)
    (record,) = results.read(recorder.file)
    with pytest.raises(ValueError, match="mixes protocols"):
        tables.render_table(SPEC, [record, record | {"artifact": "gptq"} | change])


def test_table_has_a_column_per_device_ratios_to_its_first_row_and_dashes(recorder):
    perplexity(recorder, "original", 10.0)
    perplexity(recorder, "gptq", 15.0)
    mine = results.read(recorder.file)
    stranger = mine[0] | {"notebook": "01-Setup", "artifact": "original", "value": 99.0}
    other = [r | {"device": "another", "value": 20.0, "date": "2020-01-01"} for r in mine if r["artifact"] == "gptq"]
    spec = SPEC | {"columns": {"perplexity": {"title": "困惑度", "format": "{:.0f}（{ratio:.1f}×）"}}}
    spec["rows"] = spec["rows"] | {"rtn": "RTN"}
    table = tables.render_table(spec, [*mine, *other, stranger])
    assert table.splitlines()[0].startswith(f"| 模型 | 困惑度（{recorder.device}） | 困惑度（another） |")
    assert "| 原始 | 10（1.0×） | — |" in table
    assert "| GPTQ | 15（1.5×） | 20（1.0×） |" in table
    assert "RTN" not in table  # measured nowhere
    assert f"2020-01-01 至 {mine[0]['date']} 執行" in table


def test_promote_leaves_other_notebooks_and_profiles_alone(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "COMMITTED", tmp_path / "committed")
    perplexity(recorder, "gptq", 14.0)
    (record,) = results.read(recorder.file)
    results.merge([record | {"notebook": "01-Setup"}], recorder.file)
    for name in ("03-Inference", "01-Setup"):
        tables.promote(name, recorder.file)
    results.write([record | {"profile": "gpu", "value": 13.0}], recorder.file)
    tables.promote("03-Inference", recorder.file)
    found = [(r["notebook"], r["profile"], r["value"]) for r in tables.committed()]
    assert sorted(found) == [("01-Setup", "cpu", 14.0), ("03-Inference", "cpu", 14.0), ("03-Inference", "gpu", 13.0)]


@pytest.mark.parametrize(("check", "status"), [(True, 1), (False, 0)])
def test_the_command_fails_where_a_document_is_out_of_date(monkeypatch, capsys, check, status):
    monkeypatch.setattr("sys.argv", ["tables", "render", *["--check"] * check])
    for changed, expected in (([tables.ROOT / "README.md"], status), ([], 0)):
        monkeypatch.setattr(tables, "render", lambda documents, check, changed=changed: changed)
        with pytest.raises(SystemExit) as stopped:
            tables.main()
        assert stopped.value.code == expected
    assert "README.md" in capsys.readouterr().out


def test_finish_notes_time_and_memory_in_their_units(recorder, monkeypatch):
    monkeypatch.setattr(results, "usage", lambda: Usage(seconds=12.0, memory_bytes=3 * 2**30, gpu_bytes=0))
    recorder.finish()
    found = {r["key"]: (r["value"], r["unit"]) for r in results.read(recorder.file)}
    assert found == {"notebook-seconds": (12.0, "s"), "notebook-memory": (3.0, "GiB")}


def test_rows_store_a_figure_per_artifact(recorder):
    spread = {"gptq": 0.1}
    recorder.rows("kl", {"gptq": 0.2, "rtn": 0.4}, "nats/token", spread=spread, protocol={"windows": 8}, n=8)
    stored = {r["artifact"]: (r["value"], r["spread"], r["n"], r["protocol"]) for r in results.read(recorder.file)}
    assert stored == {"gptq": (0.2, 0.1, 8, {"windows": 8}), "rtn": (0.4, None, 8, {"windows": 8})}


def test_latency_is_stored_in_milliseconds_with_how_it_was_measured(recorder):
    recorder.latency("tpot", Latency([0.001, 0.002, 0.009]), artifact="gptq", percentiles=(50, 100))
    stored = {r["key"]: (r["value"], r["unit"], r["n"], r["protocol"]) for r in results.read(recorder.file)}
    protocol = {"context": recorder.settings.context_tokens, "batch": 1, "cuda graph": False}
    assert stored == {"tpot-p50": (2.0, "ms", 3, protocol), "tpot-p100": (9.0, "ms", 3, protocol)}
    assert recorder.decoding(8) == protocol | {"batch": 8}


def test_promoted_figures_carry_their_code_and_are_of_the_recorded_model_only(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "COMMITTED", tmp_path / "committed")
    monkeypatch.setattr(tables.provenance, "code_of", lambda *what: " ".join(what))
    perplexity(recorder, "gptq", 14.0)
    (record,) = results.read(recorder.file)
    results.merge(
        [record | {"model": "a/b", "value": 99.0}, record | {"artifact": "old", "code": "before"}], recorder.file
    )
    tables.promote("03-Inference", recorder.file)
    assert {(r["artifact"], r["model"], r["code"]) for r in tables.committed()} == {
        ("gptq", "embedded", "quantization 03-Inference cpu"),
        ("old", "embedded", "before"),
    }
    tables.promote("03-Inference", recorder.file, model="a/b", code="elsewhere")
    assert [(r["value"], r["code"]) for r in tables.committed()] == [(99.0, "elsewhere")]
    with pytest.raises(ValueError, match="with model c/d"):
        tables.promote("03-Inference", recorder.file, model="c/d")


def test_a_table_says_where_its_rows_are_not_of_one_code_or_one_set_of_libraries(recorder):
    perplexity(recorder, "original", 12.66)
    perplexity(recorder, "gptq", 14.14)
    first, second = (r | {"code": "a"} for r in results.read(recorder.file))
    assert "⚠️" not in tables.render_table(SPEC, [first, second])
    line = tables.render_table(SPEC, [first, second | {"code": "b"}]).splitlines()[-1]
    assert f"⚠️ 程式的指紋不只一個（{first['device']}）。" in line
    other = second | {"versions": second["versions"] | {"torch": "1.0"}}
    assert f"⚠️ 套件版本不一：torch 1.0 / {first['versions']['torch']}。" in tables.render_table(SPEC, [first, other])


def test_every_committed_record_says_which_code_and_versions_made_it():
    records = tables.committed()
    assert records
    assert not [r for r in records if not r["code"] or not r["versions"].get("torch")]


def test_a_paired_comparison_is_stored_with_its_interval(recorder, llama, windows):
    original = evaluate(llama, windows)
    llama.model.norm.weight.data *= 1.1
    quality = evaluate(llama, windows)
    recorder.quality(quality, artifact="gptq", reference=original, corpus="wiki-leads-fr")
    stored = {r["key"]: r for r in results.read(recorder.file)}
    found = compare(quality, original)
    ratio = stored["perplexity-ratio"]
    assert (ratio["value"], ratio["spread"], ratio["n"]) == (found.ratio.value, found.ratio.standard_error, 5)
    assert ratio["interval"] == [found.ratio.low, found.ratio.high]
    assert ratio["protocol"]["against"] == "original"
    assert ratio["protocol"]["corpus"] == "wiki-leads-fr"
    assert stored["log-perplexity-difference"]["value"] == found.log_perplexity.value
    assert [stored[key]["value"] for key in ("flips", "right-before", "right-after")] == [
        found.flips,
        found.right_before,
        found.right_after,
    ]
    columns = {"perplexity-ratio": {"title": "倍率", "format": "{:.3f} [{low:.3f}, {high:.3f}]"}}
    table = tables.render_table(SPEC | {"columns": columns}, results.read(recorder.file))
    assert f"{found.ratio.value:.3f} [{found.ratio.low:.3f}, {found.ratio.high:.3f}]" in table


def test_kl_has_an_interval_where_it_has_windows(recorder, llama, windows):
    baseline = Baseline(windows=3)
    evaluate(llama, windows, keep=baseline)
    llama.model.norm.weight.data *= 1.1
    quality = evaluate(llama, windows, against=baseline)
    recorder.quality(quality, artifact="gptq")
    (kl,) = (r for r in results.read(recorder.file) if r["key"] == "kl")
    assert kl["value"] == pytest.approx(quality.kl)
    assert kl["interval"][0] < kl["value"] < kl["interval"][1]
    assert kl["spread"] == pytest.approx(quality.divergences.std().item() / 3**0.5)


def test_a_column_may_take_another_keys_records_under_one_protocol(recorder):
    for corpus, value in (("a", 1.5), ("b", 2.5)):
        recorder.record("ratio", value, "×", artifact="gptq", protocol={"corpus": corpus})
    columns = {
        name: {"key": "ratio", "where": {"corpus": name}, "title": name, "format": "{:.1f}"} for name in ("a", "b")
    }
    table = tables.render_table(SPEC | {"columns": columns}, results.read(recorder.file))
    row = next(line for line in table.splitlines() if "1.5" in line)
    assert row.index("1.5") < row.index("2.5")
