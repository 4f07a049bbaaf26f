"""The side-by-side comparison: what is measured, what an interruption keeps, what failures become, and one real row."""

import dataclasses
import json
import re
import runpy
import sys

import pytest
import torch

from benchmarks import bench, contenders
from benchmarks.bench import Row
from benchmarks.contenders import Clock, Task
from common.course.settings import ROOT, load_settings
from common.measure.results import read


@pytest.fixture
def settings(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    return load_settings("benchmark", "smoke").replace(seeds=[0, 1, 2], notebook=bench.NOTEBOOK)


def row(name, repeat=True):
    setting, library = name.split("/")
    return Row(setting, library, measure=None, repeat=repeat)


def outcome(folder, name, seed, **content):
    bench._file(folder, row(name), seed).write_text(json.dumps(content), encoding="utf-8")


def test_every_setting_of_ours_has_a_competitor():
    settings = {}
    for each in bench.rows():
        settings.setdefault(each.setting, set()).add(each.library)
    ours = {name: libraries for name, libraries in settings.items() if "ours" in libraries and name != "original"}
    assert len(ours) >= 9
    assert all(any(not library.startswith(("ours", "RTN")) for library in each) for each in ours.values())


def test_names_of_files_are_unique():
    names = [bench._file(bench.Path("x"), each, 0) for each in bench.rows()]
    assert len(set(names)) == len(names)


def test_contenders_alternate_and_what_uses_no_data_runs_once():
    plan = bench.schedule([row("a/ours"), row("a/RTN", repeat=False), row("a/them")], [5, 6])
    assert [(each.name, seed) for each, seed in plan] == [
        ("a/ours", 5),
        ("a/RTN", 5),
        ("a/them", 5),
        ("a/ours", 6),
        ("a/them", 6),
    ]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("wanda-50/ours", ["wanda-50/ours"]),  # the name of a row, though another's begins so
        ("wanda-50/ours,", ["wanda-50/ours, layer by layer"]),
        ("int", ["int8/bitsandbytes"]),
    ],
)
def test_rows_are_chosen_by_name_or_by_its_beginning(only, expected):
    assert [row.name for row in bench.choose(bench.rows(), only)] == ["original/ours", *expected]
    assert len(bench.choose(bench.rows(), "")) == len(bench.rows())


def test_what_was_measured_is_not_measured_again_and_long_or_failed_is_not_repeated(settings, tmp_path, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(tuple(command[-2:]))
        outcome(tmp_path, command[-2], int(command[-1]), figures={"seconds": [1.0, "s"]})
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(bench.subprocess, "run", run)
    outcome(tmp_path, "done/ours", 0, figures={"seconds": [1.0, "s"]})
    outcome(tmp_path, "long/them", 0, figures={"seconds": [1e6, "s"]})
    outcome(tmp_path, "broken/them", 0, error="ImportError: no such library")
    chosen = [row("done/ours"), row("long/them"), row("broken/them")]
    bench.run_all(chosen, settings, tmp_path, limit=10)
    assert calls == [("done/ours", "1"), ("done/ours", "2")]
    bench.run_all(chosen, settings, tmp_path, limit=10)
    assert len(calls) == 2


def test_a_process_that_dies_or_hangs_becomes_an_error(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    bench.run_all([row("dead/them")], settings.replace(seeds=[0]), tmp_path, limit=10)
    assert "the process ended with status 1" in capsys.readouterr().out

    def hang(command, timeout, **_):
        raise bench.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(bench.subprocess, "run", hang)
    bench.run_all([row("slow/them")], settings.replace(seeds=[0]), tmp_path, limit=10)
    assert "not done within 10 s" in capsys.readouterr().out


def test_records_hold_medians_spreads_and_errors(settings, tmp_path):
    for seed, (perplexity, seconds) in enumerate([(10.0, 5.0), (12.0, 50.0), (14.0, 7.0)]):
        figures = {"perplexity": [perplexity, "ppl"], "seconds": [seconds, "s"]}
        outcome(tmp_path, "gptq/ours", seed, figures=figures)
    outcome(tmp_path, "gptq/them", 0, error="RuntimeError: needs CUDA")
    failed, recorder = bench.collect([row("gptq/ours"), row("gptq/them")], settings, tmp_path)
    assert failed == ["gptq/them: RuntimeError: needs CUDA"]
    records = {(r["artifact"], r["key"]): r for r in read(recorder.file)}
    assert records["gptq/ours", "perplexity"]["value"] == 12
    assert records["gptq/ours", "perplexity-spread"]["value"] == 2
    assert records["gptq/ours", "seconds"]["value"] == 7
    assert records["gptq/ours", "runs"]["value"] == 3
    assert records["gptq/them", "failed"]["protocol"] == {"error": "RuntimeError: needs CUDA"}


def test_rows_that_were_not_measured_keep_their_committed_figures(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.tables, "COMMITTED", tmp_path / "committed")
    for seed, names in enumerate((["gptq/ours", "gptq/them"], ["gptq/ours"])):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for name in names:
            outcome(folder, name, 0, figures={"perplexity": [10.0 + seed, "ppl"]})
        _, recorder = bench.collect([row(name) for name in ("gptq/ours", "gptq/them")], settings, folder)
        bench.keep_unmeasured(recorder)
        bench.tables.promote(bench.NOTEBOOK, recorder.file)
    (file,) = (tmp_path / "committed").glob("*/*.json")
    values = {r["artifact"]: r["value"] for r in read(file) if r["key"] == "perplexity"}
    assert values == {"gptq/ours": 11.0, "gptq/them": 10.0}


def test_one_real_measurement(settings, tmp_path, llama, tokenizer, windows):
    """Ours, on a tiny model: what is timed, evaluated and saved; the second is compared with the first."""
    llama.save_pretrained(tmp_path / "model")
    evaluation = bench.Evaluation(settings, windows, tmp_path / "baseline.pt")
    config = dataclasses.replace(bench.GRIDS["w4-g64-asym"], group_size=32)
    got = {}
    for name, contender in (
        ("original", contenders.original),
        ("gptq", bench.partial(contenders.ours_gptq, config=config)),
        ("wanda", bench.partial(contenders.ours_prune, config=bench.PRUNINGS[0])),
        ("smoothquant", bench.partial(contenders.ours_smoothquant, alpha=0.5)),
    ):
        model = type(llama).from_pretrained(tmp_path / "model", dtype=torch.float32)
        (tmp_path / name).mkdir()
        task = Task(tmp_path / "model", model, tokenizer, windows, 4, tmp_path / name)
        got[name] = bench.quality_of(contender, task, Clock(), evaluation)
    assert set(got["original"]) == {"perplexity", "bytes"}
    assert got["gptq"]["kl"][0] > 0 < got["gptq"]["seconds"][0]
    assert got["gptq"]["bytes"][0] < got["wanda"]["bytes"][0] < got["original"]["bytes"][0]
    assert got["smoothquant"]["kl"][0] < got["gptq"]["kl"][0] < got["wanda"]["kl"][0]


def test_a_changed_embedding_disqualifies(tmp_path, llama, tokenizer, windows, monkeypatch):
    def oneshot(model, **_):
        with torch.no_grad():
            model.get_input_embeddings().weight[0] = 0

    monkeypatch.setitem(sys.modules, "llmcompressor", type("library", (), {"oneshot": oneshot}))
    task = Task(tmp_path, llama, tokenizer, windows, 4, tmp_path)
    with pytest.raises(AssertionError, match="The embedding was changed"):
        contenders._oneshot(task, Clock(), recipe=None)


def test_the_figures_are_drawn_and_shown(tmp_path):
    chapter = ROOT / "03-Model_Compression"
    runpy.run_path(str(chapter / "theory" / "figures" / "draw_benchmark.py"))["main"](tmp_path)
    drawn = {file.name for file in tmp_path.iterdir()}
    text = (chapter / "Comparisons.md").read_text(encoding="utf-8")
    assert drawn == set(re.findall(r"\]\(theory/figures/(benchmark[^)]+)\)", text))
    assert all((chapter / "theory" / "figures" / name).exists() for name in drawn)


def test_clock_times_only_what_is_inside():
    clock = Clock()
    with clock:
        torch.ones(10)
    first = clock.seconds
    torch.linalg.svd(torch.randn(200, 200))
    assert clock.seconds == first > 0
    assert clock.peak > 10**7
