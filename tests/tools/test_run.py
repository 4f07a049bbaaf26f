"""The runner: which notebooks, in what order, what a failing one costs, what is not done twice, what is recorded."""

import re
import shutil

import nbformat
import pytest

from common.course.settings import CHAPTER
from tools import notebooks, provenance, run


def write(chapter, name, *sources):
    """A notebook of `chapter` with a parameters cell and `sources`."""
    file = chapter / f"{name}.ipynb"
    file.parent.mkdir(parents=True, exist_ok=True)
    parameters = nbformat.v4.new_code_cell('PROFILE = "auto"\nMODEL = "embedded"')
    parameters.metadata["tags"] = ["parameters"]
    book = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    book.cells = [parameters, *map(nbformat.v4.new_code_cell, sources)]
    nbformat.write(book, file)
    return file


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    """A chapter with one lab and one notebook, whose code each test writes."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.setattr(notebooks, "CHAPTER", tmp_path / "chapter")
    monkeypatch.setattr(run.tables, "COMMITTED", tmp_path / "results")
    return lambda *sources: write(tmp_path / "chapter", "Lab-3.1-Quantization/01-Setup", *sources)


GOOD = """
from common.course.settings import load_settings
from common.measure.results import Recorder
settings = load_settings("quantization", PROFILE, MODEL).replace(notebook="01-Setup")
recorder = Recorder(settings)
recorder.record("answer", 42.0, "units", artifact="test", protocol={}, headline=True)
recorder.finish()
"""


@pytest.mark.notebooks
def test_summary_shows_time_memory_and_headlines(chapter, capsys):
    chapter(GOOD)
    assert run.main(["--profile", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "[1/1] Lab-3.1-Quantization/01-Setup" in out
    assert "test answer 42 units" in out
    assert "GiB" in out
    assert "Executed notebooks:" in out


# --- seven notebooks, four of which die, each in its own way -------------------------------------------------------

MAKES = """
import json, os, pathlib
artifact = pathlib.Path(os.environ["COURSE_WORK"], "artifacts", "embedded", "smoke", "wanda", "artifact.json")
artifact.parent.mkdir(parents=True, exist_ok=True)
artifact.write_text(json.dumps("the same each time"))
"""
COUNTS = """
import os, pathlib
with open(pathlib.Path(os.environ["COURSE_WORK"], "ran"), "a") as file:
    file.write("once more")
"""
BEYOND = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
much = bytearray(2**33)
"""
PLANTED = {
    "Lab-3.1-Quantization/01-Setup": "import ctypes\nctypes.string_at(0)",
    "Lab-3.1-Quantization/02-Quantize": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "Lab-3.1-Quantization/03-Inference": 'load("gptq", made_by="Lab-3.1-Quantization/02-Quantize")',
    "Lab-3.1-Quantization/04-Deploy": BEYOND,
    "Lab-3.2-Pruning/01-Setup": MAKES,
    "Lab-3.2-Pruning/02-Prune": 'made_by = "Lab-3.2-Pruning/01-Setup"' + COUNTS,
    "Lab-3.3-Distillation/01-Setup": "import os\nos._exit(3)",
    "Lab-3.3-Distillation/Exercises": "raise NotImplementedError",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """The folder of a chapter with the planted notebooks and of its work."""
    folder = tmp_path_factory.mktemp("faults")
    for name, source in PLANTED.items():
        write(folder / "chapter", name, source)
    return folder


def printed(folder, *arguments):
    """Run notebooks of `folder`'s chapter: the exit status, and what was printed."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_WORK", str(folder / "work"))
        patch.setattr(notebooks, "CHAPTER", folder / "chapter")
        patch.setattr(run, "embedded_folder", lambda spec: None)
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(map(str, texts))))
        status = run.main(["--profile", "smoke", *arguments])
    return status, "\n".join(lines)


@pytest.fixture(scope="module")
def first(faults):
    """The first run of all of them."""
    return printed(faults)


def rows(text):
    """Title → the summary's line about it, from its mark on."""
    return {line.split()[1]: line for line in text.splitlines() if re.match(r"(✅|❌|➖) \S+ {2,}", line)}


@pytest.mark.notebooks
def test_each_fault_is_told_by_its_true_name(first):
    status, text = first
    assert status == 1
    assert "❌ Lab-3.1-Quantization/01-Setup, cell [3] crashed in native code (SIGSEGV)\n\n    import ctypes" in text
    assert "❌ Lab-3.1-Quantization/02-Quantize, cell [3] was killed from outside (SIGKILL)" in text
    assert "the main memory was full" not in text, "nothing says so"
    assert "❌ Lab-3.1-Quantization/04-Deploy, cell [3] failed" in text
    assert re.search(r"MemoryError: *\n\n +Close other programs, or use a smaller profile", text)
    assert "❌ Lab-3.3-Distillation/01-Setup, cell [3] ended its own process (exit status 3)" in text
    assert "make labs LAB=3.1 NOTEBOOK=01 PROFILE=smoke" in text


@pytest.mark.notebooks
def test_a_failed_notebook_stops_only_those_that_need_it(first):
    _, text = first
    lines = rows(text)
    assert list(lines) == [name for name in PLANTED if "Exercises" not in name]
    states = [re.search(r"(done|failed|not run|  +\d+ s)", line)[1].split()[-1] for line in lines.values()]
    assert states == ["failed", "failed", "run", "failed", "s", "s", "failed"]
    assert lines["Lab-3.1-Quantization/03-Inference"].endswith(
        "not run: it needs what Lab-3.1-Quantization/02-Quantize makes"
    )
    assert "2 done · 4 failed · 1 not run" in text


@pytest.mark.notebooks
def test_what_is_done_is_not_done_again_while_nothing_changed(first, faults):
    work, prune = faults / "work", faults / "chapter" / "Lab-3.2-Pruning" / "02-Prune.ipynb"

    def again(*more):
        status, text = printed(faults, "--lab", "3.2", *more)
        assert status == 0
        return ["already done" in line for line in rows(text).values()]

    assert again() == [True, True]
    assert (work / "ran").read_text() == "once more"
    shutil.rmtree(work / "artifacts")  # as the message of a damaged artifact advises
    assert again() == [False, True], "01 makes it anew; it is the same, so that 02 need not run"
    artifact = work / "artifacts" / "embedded" / "smoke" / "wanda" / "artifact.json"
    artifact.write_text('"made by hand, in Jupyter"')
    source = prune.read_text(encoding="utf-8")
    prune.write_text(source.replace("once more", "and once more"), encoding="utf-8")
    assert again() == [False, False], "neither another artifact nor other code is the same"
    assert (work / "ran").read_text() == "once moreand once more"
    assert again("--again", "--notebook", "02") == [False]
    assert (work / "ran").read_text() == "once moreand once moreand once more"


@pytest.mark.notebooks
def test_another_input_runs_a_notebook_anew(first, faults):
    setup = faults / "chapter" / "Lab-3.2-Pruning" / "01-Setup.ipynb"
    setup.write_text(setup.read_text(encoding="utf-8").replace("the same", "not the same"), encoding="utf-8")
    status, text = printed(faults, "--lab", "3.2")
    assert (status, "already done" in text) == (0, False)


@pytest.mark.notebooks
def test_a_hang_is_cut_by_the_limit(chapter, capsys):
    chapter("import time\ntime.sleep(600)")
    assert run.main(["--profile", "smoke", "--cell-limit", "3"]) == 1
    out = capsys.readouterr().out
    assert "❌ Lab-3.1-Quantization/01-Setup, cell [3] took longer than the limit of 3 s for one cell" in out
    assert "time.sleep(600)" in out
    assert "LIMIT=..." in out


# --- which notebooks ------------------------------------------------------------------------------------------------


def test_advanced_notebooks_are_found_and_exercises_are_not(chapter):
    folder = chapter("pass").parents[1]
    for name in ("Advanced/A4-Many_GPUs", "Lab-3.1-Quantization/Exercises", "Advanced/Exercises"):
        write(folder, name, "pass")
    found = notebooks.find_notebooks()
    assert list(map(notebooks.title, found)) == ["Lab-3.1-Quantization/01-Setup", "Advanced/A4-Many_GPUs"]
    assert notebooks.find_notebooks("A", "A4") == found[1:]
    assert notebooks.LAB_OF_FOLDER[found[1].parent.name] == "advanced"


def test_the_chapter_readme_says_what_each_notebook_needs():
    """The code is the source: a notebook names those whose artifacts it loads."""
    table = (CHAPTER / "README.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| \d+ \| \[.*?\]\((Lab-[^/]+)/([^)]+)\.ipynb\) \|[^|]*\| ([^|]*) \|", re.MULTILINE)
    said = {f"{folder}/{name}": re.findall(r"\d\d", what) for folder, name, what in row.findall(table)}
    files = [file for file in notebooks.find_notebooks() if file.parent.name.startswith("Lab-")]
    needed = {notebooks.title(f): [name.split("/")[1][:2] for name in notebooks.needs(f)] for f in files}
    assert said == needed
    known = set(map(notebooks.title, files))
    assert all(name in known and name < notebooks.title(f) for f in files for name in notebooks.needs(f))


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
    done = [run.Outcome(tmp_path / folder / "01-Setup.ipynb", "done", seconds=10.0) for folder in labs.values()]
    _, first, second, _, count = run.summary(done, records).splitlines()
    assert count == "2 done"
    assert first.split(maxsplit=5) == [
        "✅",
        "Lab-3.1-Quantization/01-Setup",
        "10",
        "s",
        "-",
        "original quantization perplexity 12,346 ppl",
    ]
    assert second.endswith("10 s   1.5 GiB  original pruning perplexity 12,346 ppl")


@pytest.mark.notebooks
def test_parameters_reach_the_notebook(chapter, capsys):
    chapter('assert (PROFILE, MODEL) == ("smoke", "some/model")')
    assert run.main(["--profile", "smoke", "--model", "some/model"]) == 0


@pytest.mark.notebooks
def test_model_is_the_teacher_in_the_distillation_lab(tmp_path, chapter, capsys):
    expected = ("smoke", "some/model", "a/student")
    file = chapter(f'assert (PROFILE, TEACHER, STUDENT) == {expected}\nassert MODEL == "embedded"')
    folder = file.parent.with_name("Lab-3.3-Distillation")
    file.parent.rename(folder)
    assert run.main(["--profile", "smoke", "--model", "some/model", "--student", "a/student"]) == 0


@pytest.mark.notebooks
def test_failing_cell_is_shown_with_its_code_error_and_what_to_do(chapter, capsys):
    chapter("wanted = 3\nraise ValueError('group_size 7 does not divide 576')")
    assert run.main(["--profile", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "01-Setup, cell [" in out
    assert "wanted = 3" in out
    assert "ValueError: group_size 7 does not divide 576" in out
    assert "make labs LAB=3.1 NOTEBOOK=01 PROFILE=cpu" in out


@pytest.mark.notebooks
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
