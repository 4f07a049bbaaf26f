"""The comparison of methods: NF4 against the library, what it records, which rankings it says have changed."""

import pytest
import torch

from benchmarks import compare
from common.course.settings import load_settings
from common.measure import results, tasks
from common.measure.evaluation import Quality


def test_nf4_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    torch.testing.assert_close(compare.nf4(weight), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_records_every_figure_with_its_interval(tmp_path, monkeypatch, llama, tokenizer, make_llama):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    monkeypatch.setattr(tasks, "WORDS", 8)
    settings = load_settings("benchmark", "smoke").replace(notebook="compare", seqlen=64, quality_windows=3)
    measure = compare.Measure(settings, tokenizer, llama)
    worse = make_llama()
    compare.nf4_model(worse)
    measure(worse, "NF4")
    assert {"original", "NF4"} == set(measure.table().columns)
    stored = [r for r in results.read(measure.recorder.file) if r["artifact"] == "NF4"]
    assert {r["notebook"] for r in stored} == {"compare"}
    ratios = {r["protocol"]["corpus"]: r for r in stored if r["key"] == "perplexity-ratio"}
    assert set(ratios) == {"wiki-leads", "wiki-topics", "wiki-leads-fr"}  # this tokenizer has no template for chats
    assert all(r["interval"][0] < r["value"] < r["interval"][1] for r in ratios.values())
    assert any(r["key"] == "kl" for r in stored)
    answered = {r["protocol"]["task"]: r for r in stored if r["key"] == "accuracy-difference"}
    assert set(answered) == set(tasks.CHANCE)
    assert all(r["n"] == settings.task_items for r in answered.values())
    assert "French" in measure.told_apart("NF4", "original")


def quality(*losses: float) -> Quality:
    found = Quality(torch.tensor(losses).mean().exp().item(), 0.0)
    found.losses = torch.tensor(losses)
    found.hits = found.choices = torch.zeros(len(losses), 1, dtype=torch.bool)
    return found


def test_changed_rankings(monkeypatch):
    old = {"gptq-w4-g64-asym/RTN": 16.4, "awq-w4-g64-asym/ours": 15.0, "nf4/bitsandbytes": 15.5, "wanda-50/ours": 32.0}
    records = [
        {"notebook": "bench", "key": "perplexity", "artifact": name, "value": value, "device": "card"}
        for name, value in old.items()
    ]
    monkeypatch.setattr(compare.tables, "committed", lambda: records)
    now = {
        "RTN 4 bits": quality(3.0, 4.0, 5.0),
        "AWQ 4 bits": quality(3.08, 4.07, 5.08),  # was better than RTN and NF4, is worse
        "NF4": quality(3.01, 3.98, 5.0),  # was better than RTN, cannot be told from it
        "Wanda 50 %": quality(4.0, 5.0, 6.01),
    }
    lines = compare.changed_rankings(now)
    assert len(lines) == 3
    figures = "(card: 15.00 < 16.40): now 58.95, 54.60"
    assert lines[0] == f"AWQ 4 bits before RTN 4 bits {figures}, the other way round"
    assert [line.split(" (")[0] for line in lines] == [
        "AWQ 4 bits before RTN 4 bits",
        "NF4 before RTN 4 bits",
        "AWQ 4 bits before NF4",
    ]
    assert lines[1].endswith("not told apart")
