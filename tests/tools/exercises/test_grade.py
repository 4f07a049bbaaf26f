"""A class's submissions: solutions get everything, blanks nothing, and tricks are told and not rewarded."""

import csv
import importlib.util
import json
import time

import nbformat
import pytest

from common.course.exercises import try_out
from tools.exercises import grade, master, sheet
from tools.exercises.__main__ import main, mark_all, submissions

LAB = "3.1"


@pytest.fixture(scope="module")
def chosen():
    return master.load(LAB)


@pytest.fixture(scope="module")
def checker(chosen):
    return grade.Checker(chosen)


@pytest.fixture
def hand_in(chosen, checker, tmp_path):
    """Marks of the solved notebook after some change, and what was told of one task."""

    def submit(change=lambda cells, book: None, secret="", seconds=20, tasks=("rtn", "pack")):
        book = master.notebook(chosen, solutions=True)
        change({cell.id: cell for cell in book.cells}, book)
        file = tmp_path / "b12345678.ipynb"
        nbformat.write(book, file)
        few = master.Master(LAB, [cell for cell in chosen.cells if not cell.task or cell.task in tasks])
        return grade.mark(file, few, checker, secret, seconds=seconds)

    return submit


@pytest.mark.parametrize("lab", master.LABS)
def test_solutions_get_everything_and_blanks_nothing_within_two_minutes(lab, tmp_path):
    chosen, start = master.load(lab), time.monotonic()
    checker = grade.Checker(chosen)
    for solved in (True, False):
        file, book = tmp_path / f"{solved}.ipynb", master.notebook(chosen, solutions=solved)
        next(cell for cell in book.cells if cell.metadata.get("tags") == ["student"]).source = 'STUDENT = "b1"'
        nbformat.write(book, file)
        marks = grade.mark(file, chosen, checker, secret="only the instructor knows")
        lost = [mark for task in marks.tasks for mark in task.marks if mark.gained != solved * mark.points]
        assert lost == []
        assert marks.notes == [note for task in marks.tasks for note in task.notes] == []
    assert time.monotonic() - start < 240  # two of them, on a machine that does other things too


def changed(name, old, new):
    def change(cells, book):
        assert old in cells[name].source
        cells[name].source = cells[name].source.replace(old, new)

    return change


def replaced(name, source):
    return lambda cells, book: cells[name].update(source=source)


DONE = "def pack(codes):\n    return codes\n\n\ndef unpack(packed):\n    return packed\n"
TRICKS = {
    "an endless loop": (
        changed("solution-pack", "words = torch", "while True: pass\n    words = torch"),
        "endless loop",
    ),
    "exit": (changed("solution-pack", "words = torch", "exit()\n    words = torch"), "exit()"),
    "patched": (
        changed("solution-pack", "def pack", "torch.allclose = lambda *a, **k: True\ndef pack"),
        "torch.allclose",
    ),
    "the course's": (replaced("solution-pack", "from common.formats.packing import pack_rows as pack"), "by hand"),
    "deleted": (lambda cells, book: book.cells.remove(cells["solution-pack"]), "missing"),
    "twice": (lambda cells, book: book.cells.append(cells["solution-pack"]), "more than once"),
    "magic": (replaced("solution-pack", "!pip install answers\n"), "not Python"),
    "returns what it is given": (replaced("solution-pack", DONE), ""),
}


def test_a_task_whose_package_is_not_installed_is_skipped_with_a_sentence(hand_in, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    marks = hand_in(tasks=("pack", "triton"))
    skipped = next(task for task in marks.tasks if task.name == "triton")
    assert (skipped.gained, skipped.points, marks.points) == (0, 0, 6)
    assert {mark.message.partition(".")[0] for mark in skipped.marks} == {"Skipped: triton is not installed"}
    try_out("amy", [lambda: None], lambda function, rng: None, needs="triton")
    assert capsys.readouterr().out.startswith("➖ Skipped: triton is not installed.")


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_are_told_and_not_rewarded(name, hand_in):
    change, told = TRICKS[name]
    marks = hand_in(change, seconds=3)
    pack = next(task for task in marks.tasks if task.name == "pack")
    assert pack.gained == 0
    assert told in " ".join(pack.notes)
    assert next(task for task in marks.tasks if task.name == "rtn").gained == 6, "the others keep theirs"


@pytest.mark.parametrize("lab", master.LABS)
def test_an_answer_may_call_all_functions_of_earlier_tasks_and_gets_the_references(lab, tmp_path):
    """Every answer but the last task's is blank, and the last task's reads all functions that were asked for before."""
    chosen = master.load(lab)
    checker = grade.Checker(chosen)
    *earlier, last = chosen.tasks.values()
    names = [name for task in earlier for name in checker.checks(task)[0]]
    assert len(names) == len(set(names)) >= len(earlier)
    book = master.notebook(chosen, solutions=False)
    cell = next(cell for cell in book.cells if cell.id == f"solution-{last.name}")
    cell.source = f"earlier = [{', '.join(names)}]\n\n\n{last.solution}"
    file = tmp_path / "b1.ipynb"
    nbformat.write(book, file)
    marks = grade.mark(file, chosen, checker)
    assert {task.name: task.gained for task in marks.tasks if task.gained} == {last.name: last.points}


def test_the_answers_process_holds_no_later_solution(chosen):
    before = chosen.before(chosen.tasks["update"])
    assert "def decode(" in before
    assert "def update(" not in before and "def gptq(" not in before


def test_changed_and_deleted_tests_are_told_and_the_originals_run(hand_in):
    easy = replaced("test-pack", "print('6 / 6')")
    for change in (easy, lambda cells, book: book.cells.remove(cells["test-pack"])):

        def both(cells, book, change=change):
            changed("solution-pack", "4 * i", "3 * i")(cells, book)
            change(cells, book)

        pack = next(task for task in hand_in(both).tasks if task.name == "pack")
        assert pack.gained == 0
        assert "not the one handed out" in pack.notes[0]


def test_partial_points_and_the_reason(hand_in):
    marks = hand_in(changed("solution-rtn", "return (codes.float() - zero) * scale", "return codes.float() * scale"))
    rtn = next(task for task in marks.tasks if task.name == "rtn")
    assert [mark.gained for mark in rtn.marks] == [3, 0, 0]
    assert "decode is wrong in" in rtn.marks[1].message


def test_answers_learnt_by_heart_fail_on_hidden_inputs(hand_in, chosen, checker):
    """An answer that is right for the visible inputs alone: here, for the first four calls."""
    cheat = "calls = []\n\n\ndef checkpoint_bytes(shapes, others, bits, group_size):\n    calls.append(1)\n"
    right = chosen.tasks["bytes"].solution.split("### BEGIN SOLUTION\n")[1].replace("    ### END SOLUTION", "")
    change = replaced("solution-bytes", cheat + "    if len(calls) > 6:\n        return 0\n" + right)
    assert [hand_in(change, secret, tasks=("bytes",)).gained for secret in ("", "secret")] == [4, 0]


@pytest.mark.parametrize(
    ("source", "name", "told"),
    [
        ('STUDENT = "b007"', "b007", []),
        ("STUDENT = 7", "7", []),
        ('STUDENT = "b007"\nprint("hello")', "b007", ["what else it holds was not run"]),
        ('STUDENT = "b007"\ntorch.allclose = f', "b007", ["one line", "replaces torch.allclose"]),
        ("STUDENT = input()", "b12345678", ["no name", "(b12345678) stands in"]),
        ('STUDENT = " "', "b12345678", ["no name"]),
        (f'STUDENT = "{grade.PLACEHOLDER}"', "b12345678", ["no name"]),
        ("STUDENT = b007 amy", "b12345678", ["not Python"]),
    ],
)
def test_the_name_comes_from_the_notebook_else_from_the_file_which_is_told(source, name, told, hand_in):
    marks = hand_in(replaced("student-1", source), tasks=())
    assert marks.student == name
    assert all(part in " ".join(marks.notes) for part in told)
    assert bool(marks.notes) == bool(told)


def test_the_placeholder_is_the_masters():
    for lab in master.LABS:
        assert master.load(lab).source("student") == f'STUDENT = "{grade.PLACEHOLDER}"'


def test_what_other_cells_replace_is_told(hand_in):
    def change(cells, book):
        cells["student-1"].source = 'STUDENT = "amy"'
        book.cells.append(nbformat.v4.new_code_cell("torch.allclose = lambda *a: True"))

    assert hand_in(change, tasks=()).notes == ["A cell that is no answer replaces torch.allclose; it was not run."]


def test_a_class(tmp_path, chosen, capsys):
    for name, source in (("amy", 'STUDENT = "=amy"'), ("ben", 'STUDENT = "<b>ben</b>"')):
        book = master.notebook(chosen, solutions=False)
        next(cell for cell in book.cells if cell.id == "student-1").source = source
        (tmp_path / name).mkdir()
        nbformat.write(book, tmp_path / name / "Exercises.ipynb")
    (tmp_path / "cat.ipynb").write_text("no notebook", encoding="utf-8")
    marks = mark_all(LAB, tmp_path, "", tmp_path / "sheets")
    assert [one.student for one in marks] == ["=amy", "<b>ben</b>", "cat"]
    assert "no notebook" in marks[2].notes[0]
    assert [note for one in marks[:2] for note in one.notes] == []
    content = json.loads((tmp_path / "sheets/sheet.json").read_text(encoding="utf-8"))
    assert [(one["gained"], one["points"]) for one in content] == [(0, marks[0].points)] * 3
    page = (tmp_path / "sheets/sheet.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;ben" in page and "<b>ben" not in page
    rows = list(csv.reader((tmp_path / "sheets/sheet.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert rows[0][:3] == ["student", "points", "of"]
    assert rows[1][0] == "'=amy", "a spreadsheet would take it for a formula"


def test_two_submissions_of_one_student_are_told(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        cell = nbformat.v4.new_code_cell('STUDENT = "amy"', metadata={"tags": ["student"]})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / folder / "Exercises.ipynb")
    first, second = mark_all(LAB, tmp_path, "", tmp_path / "sheets")
    assert "b/Exercises.ipynb" in first.notes[-1] and "a/Exercises.ipynb" in second.notes[-1]


def test_a_missing_place_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["exercises", "grade", "--lab", LAB, str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="no folder that holds any"):
        main()


def test_no_submission_is_an_error(tmp_path):
    for place in (tmp_path, tmp_path / "nothing.ipynb"):
        with pytest.raises(FileNotFoundError, match="no folder that holds any"):
            submissions(place)


def test_sheet_is_written_where_no_folder_is_yet(tmp_path):
    marks = grade.Marks("a", "a.ipynb", LAB, [], [], False)
    sheet.write(tmp_path / "new", [marks])
    assert (tmp_path / "new/sheet.csv").exists()
