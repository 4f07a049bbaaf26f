"""The exercise notebooks: made of their masters, right from top to bottom, and written as the course writes."""

import re

import nbformat
import pytest

from tools.documents import check
from tools.documents.markdown import read
from tools.exercises import master

each_lab = pytest.mark.parametrize("lab", master.LABS)


def apart(lab, cell) -> bool:
    """Whether a cell is of a task that needs a package: it runs in the sandbox alone, where `test_grade` tries it."""
    task = master.load(lab).tasks.get(cell.id.partition("-")[2])
    return task is not None and bool(task.needs)


def books(lab):
    return (master.notebook(master.load(lab), solutions=solved).cells for solved in (False, True))


def test_committed_notebooks_are_up_to_date():
    assert master.write(check=True) == [], "run: make exercises"


@each_lab
def test_the_students_notebook_is_the_instructors_without_what_stands_in_the_blanks(lab):
    blanks = 0
    for student, solved in zip(*books(lab), strict=True):
        around = re.split(r"^ *### BEGIN SOLUTION\n(?:.*\n)*? *### END SOLUTION$", solved.source, flags=re.M)
        assert student.source == "    # YOUR CODE HERE\n    raise NotImplementedError()".join(around)
        assert (len(around) > 1) == (student.metadata.get("tags") == ["solution"])
        assert {**student, "source": ""} == {**solved, "source": ""}
        assert "SOLUTION" not in student.source
        blanks += len(around) - 1
    assert blanks >= len(master.load(lab).tasks)


@each_lab
def test_solved_it_runs_from_top_to_bottom_with_all_points(lab, capsys):
    names = {"__name__": "__main__"}
    for cell in list(books(lab))[1]:
        if cell.cell_type == "code" and not apart(lab, cell):
            exec(cell.source, names)
            said = capsys.readouterr().out
            if cell.metadata.tags == ["test"]:
                points = cell.metadata.nbgrader["points"]
                assert said.endswith(f"{points} / {points}\n"), said


@each_lab
def test_unsolved_every_test_says_not_written_and_gives_nothing(lab, capsys):
    names = {"__name__": "__main__"}
    for cell in next(iter(books(lab))):
        if cell.cell_type == "code" and not apart(lab, cell):
            exec(cell.source, names)
            said = capsys.readouterr().out
            if cell.metadata.tags == ["test"]:
                assert said.endswith(f"0 / {cell.metadata.nbgrader['points']}\n")
                assert set(re.findall("^.", said, re.M)) == {"➖", "0"}


@pytest.mark.parametrize(
    ("lab", "answers"),
    [
        ("3.1", [".round().clamp(", ".abs().mean(0) **", "math.exp(", "diagonal > 0"]),
        ("3.2", ["argsort()[", "linalg.solve", "share.mean()", "pruned(w,", "16 ** ("]),
        ("3.3", ["cosine_similarity", "optim.SGD", "[:, 1:]", "einsum", "cumsum", ".var().sqrt()", "losses[real]"]),
    ],
)
def test_the_students_notebook_holds_no_answer(lab, answers):
    """Checks compare with what stands in common/course/exercises_3_N.py and exercises_given.py."""
    code = [cell.source for cell in next(iter(books(lab))) if cell.cell_type == "code"]
    assert [answer for answer in answers if any(answer in source for source in code)] == []


@each_lab
def test_has_what_an_exercise_has(lab):
    tasks, cells = master.load(lab).tasks, list(next(iter(books(lab))))
    assert 8 <= len(tasks) <= 12
    assert "clinic" in tasks
    for number, task in enumerate(tasks.values(), start=1):
        statement = next(cell.source for cell in cells if cell.id == f"markdown-{task.name}")
        assert statement.startswith(f"## {number} · ")
        assert f"· {task.points} 分 ·" in statement
        assert len(master.POINTS.findall(task.test)) >= 2
        assert [name for name in task.without if f"`{name}`" not in statement] == [], "refused, and not announced"
        after = cells[[cell.id for cell in cells].index(f"markdown-{task.name}") + 1 :]
        hint = next(cell.source for cell in after if cell.cell_type == "markdown")
        assert hint.startswith("<details><summary>💡 提示</summary>")
    assert sum("Ablation" in task.test or "消融" in task.test for task in tasks.values()) >= 3


@each_lab
def test_prose_keeps_the_guide(lab):
    rules = check.glossary(check.GUIDE.read_text(encoding="utf-8"))
    for document in read(master.student_file(lab)):
        found = [check.broken_links(document), check.terms(document, rules), check.spacing(document)]
        assert [str(finding) for findings in [*found, check.unwanted(document)] for finding in findings] == []


@each_lab
def test_it_is_a_notebook_that_others_read(lab):
    nbformat.validate(nbformat.read(master.student_file(lab), as_version=4))
