"""The runner: which notebooks, what a failing cell shows, what is recorded."""

import nbformat
import pytest

from tools import provenance, run


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """A chapter with one lab and one notebook, whose code each test writes."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.setattr(run, "CHAPTER", tmp_path / "chapter")
    monkeypatch.setattr(run.tables, "COMMITTED", tmp_path / "results")

    def write(*sources):
        file = tmp_path / "chapter" / "Lab-3.1-Quantization" / "01-Setup.ipynb"
        file.parent.mkdir(parents=True, exist_ok=True)
        parameters = nbformat.v4.new_code_cell('PROFILE = "auto"\nMODEL = "embedded"')
        parameters.metadata["tags"] = ["parameters"]
        language = {"language_info": {"name": "python"}}
        book = nbformat.v4.new_notebook(metadata=language)
        book.cells = [parameters, *map(nbformat.v4.new_code_cell, sources)]
        nbformat.write(book, file)
        return file

    return write


GOOD = """
from common.course.settings import load_settings
from common.measure.results import Recorder
settings = load_settings("quantization", PROFILE, MODEL).replace(notebook="01-Setup")
recorder = Recorder(settings)
recorder.record("answer", 42.0, "units", artifact="test", protocol={}, headline=True)
recorder.finish()
"""


def test_summary_shows_time_memory_and_headlines(chapter, capsys):
    chapter(GOOD)
    assert run.main(["--profile", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "[1/1] Lab-3.1-Quantization/01-Setup" in out
    assert "test answer 42 units" in out
    assert "GiB" in out
    assert "Executed notebooks:" in out


def test_a_killed_kernel_is_told_from_a_failing_cell(chapter, capsys):
    """As the kernel ends a process when the memory is full."""
    chapter("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert run.main(["--profile", "smoke"]) == 1
    out = capsys.readouterr().out
    assert (
        "❌ Lab-3.1-Quantization/01-Setup: its process was killed, most often because the main memory was full." in out
    )
    assert "make labs LAB=3.1 NOTEBOOK=01 PROFILE=smoke" in out


def test_a_notebook_that_is_not_there_is_one_line(chapter, capsys):
    chapter("pass")
    assert run.main(["--lab", "9.9"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("❌ No notebook matches --lab '9.9' --notebook ''.")
    assert "Lab-3.1-Quantization/01-Setup" in out


def test_summary_keeps_the_labs_apart(tmp_path):
    """Each lab has a 01-Setup of its own."""
    labs = {"quantization": "Lab-3.1-Quantization", "pruning": "Lab-3.2-Pruning"}
    record = {"notebook": "01-Setup", "artifact": "original", "unit": "ppl", "headline": True}
    records = [record | {"lab": lab, "key": f"{lab} perplexity", "value": 12345.6} for lab in labs]
    records += [{"lab": "pruning", "notebook": "01-Setup", "key": "notebook-memory", "value": 1.5, "headline": False}]
    done = [(tmp_path / folder / "01-Setup.ipynb", 10.0) for folder in labs.values()]
    _, first, second = run.summary(done, records).splitlines()
    assert first.split(maxsplit=4) == [
        "Lab-3.1-Quantization/01-Setup",
        "10",
        "s",
        "-",
        "original quantization perplexity 12,346 ppl",
    ]
    assert second.endswith("10 s   1.5 GiB  original pruning perplexity 12,346 ppl")


def test_parameters_reach_the_notebook(chapter, capsys):
    chapter('assert (PROFILE, MODEL) == ("smoke", "some/model")')
    assert run.main(["--profile", "smoke", "--model", "some/model"]) == 0


def test_model_is_the_teacher_in_the_distillation_lab(tmp_path, chapter, capsys):
    expected = ("smoke", "some/model", "a/student")
    file = chapter(f'assert (PROFILE, TEACHER, STUDENT) == {expected}\nassert MODEL == "embedded"')
    folder = file.parent.with_name("Lab-3.3-Distillation")
    file.parent.rename(folder)
    assert run.main(["--profile", "smoke", "--model", "some/model", "--student", "a/student"]) == 0


def test_failing_cell_is_shown_with_its_code_error_and_what_to_do(chapter, capsys):
    chapter("wanted = 3\nraise ValueError('group_size 7 does not divide 576')")
    assert run.main(["--profile", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "01-Setup, cell [" in out
    assert "wanted = 3" in out
    assert "ValueError: group_size 7 does not divide 576" in out
    assert "make labs LAB=3.1 NOTEBOOK=01 PROFILE=cpu" in out


def test_record_keeps_outputs_figures_and_provenance(chapter, tmp_path):
    file = chapter(GOOD + "print('hello')")
    assert run.main(["--record"]) == 0
    book = nbformat.read(file, as_version=4)
    assert provenance.stale(book) == ""
    assert [cell.execution_count for cell in book.cells] == [1, 2]
    assert "hello" in book.cells[1].outputs[-1].text
    assert list((tmp_path / "results").glob("*/quantization.json"))


def test_smoke_figures_are_never_recorded(chapter, capsys):
    chapter(GOOD)
    with pytest.raises(SystemExit):
        run.main(["--record", "--profile", "smoke"])
    assert "no smoke profile" in capsys.readouterr().err


def test_a_recorded_notebook_has_no_injected_cell_and_counts_from_one():
    cells = [nbformat.v4.new_code_cell(source, execution_count=n) for n, source in enumerate("abc", start=1)]
    cells[1].metadata["tags"] = ["injected-parameters"]
    cells[2].outputs = [nbformat.v4.new_output("execute_result", data={"text/plain": "c"}, execution_count=3)]
    book = nbformat.v4.new_notebook(cells=cells)
    run.without_parameters(book)
    assert [(c.source, c.execution_count) for c in book.cells] == [("a", 1), ("c", 2)]
    assert book.cells[1].outputs[0].execution_count == 2
