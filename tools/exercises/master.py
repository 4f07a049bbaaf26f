"""A lab's exercises from their one source, `lab_3_N.py`: the students' notebook, and the instructor's with solutions.

A master is a Python file in percent format. The line above a cell says what it is:

    # %% markdown [TASK]                  prose, written as comments; `{points}` is the sum of the task's checks,
                                          `{without}` the names that its solution may not use
    # %% student                          the student's name, from which all inputs are drawn
    # %% given [TASK]                     code for everyone; an answer's process gets what stands above the answer.
                                          With a task: not for its checks
    # %% checker                          code for checks only: the sandbox never sees it
    # %% solution TASK [without=X,Y]      without: names it may not use
    # %% test TASK                        `needs="PACKAGE"` in its last call: skipped where that is not installed

Solutions stand between `### BEGIN SOLUTION` and `### END SOLUTION`, and cells carry nbgrader's metadata, so that the
instructor's notebook is an nbgrader assignment as well. (nbgrader itself runs checks in the student's own process.)
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode, v4

from common.course.exercises import lacking
from common.course.settings import CHAPTER, work_folder

LABS = ("3.1", "3.2", "3.3")
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # as nbgrader writes it
HEAD = re.compile(r"^# %% (?P<kind>\w+) ?(?P<task>[\w-]+)?(?P<options>.*)$", re.M)
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$", re.M | re.S)
NEEDS = re.compile(r'^try_out\(.*needs="(\w+)"\)$', re.M)
POINTS = re.compile(r"^@worth\((\d+)(?:, after=\w+)?\)$", re.M)


@dataclass(frozen=True)
class Cell:
    """One cell of a master; `task` is "" where it belongs to none."""

    kind: str
    source: str
    task: str = ""
    options: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One exercise: its solution, its checks, the names that its solution may not use."""

    name: str
    title: str
    solution: str
    test: str
    without: list[str]

    @property
    def points(self) -> int:
        return sum(map(int, POINTS.findall(self.test)))

    @property
    def needs(self) -> str:
        """A package without which the task is skipped; "" for most."""
        found = NEEDS.search(self.test)
        return found[1] if found else ""

    @property
    def lacking(self) -> str:
        """Why the task is skipped on this machine, as a sentence; "" where it is not."""
        return lacking(self.needs)


@dataclass(frozen=True)
class Master:
    """A lab's exercises."""

    lab: str
    cells: list[Cell]

    def source(self, *kinds: str) -> str:
        """The code of all cells of these kinds that belong to no task."""
        return "\n\n".join(cell.source for cell in self.cells if cell.kind in kinds and not cell.task)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks by name, in order."""
        by = {(cell.kind, cell.task): cell for cell in self.cells}
        found = {}
        for cell in self.cells:
            if cell.kind == "solution":
                title = re.search(r"^## (.*)$", by["markdown", cell.task].source, re.M)[1].split(" · ")[1]
                test, without = by["test", cell.task].source, cell.options.get("without", [])
                found[cell.task] = Task(cell.task, title, cell.source, test, without)
        return found

    def before(self, task: Task) -> str:
        """What runs in the sandbox before a task's cell: the given code and the solutions that stand above it.

        The master's own solutions: one mistake costs its points once.
        """
        own = next(i for i, cell in enumerate(self.cells) if (cell.kind, cell.task) == ("solution", task.name))
        return "\n\n".join(cell.source for cell in self.cells[:own] if cell.kind in ("given", "solution"))


@cache
def load(lab: str) -> Master:
    """The master of a lab, such as "3.1"."""
    return parse(lab, (Path(__file__).parent / f"lab_{lab.replace('.', '_')}.py").read_text(encoding="utf-8"))


def parse(lab: str, text: str) -> Master:
    """The master that a percent file holds; what stands before its first cell is about the file."""
    heads = list(HEAD.finditer(text))
    cells = []
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        source = text[head.end() : following.start() if following else None].strip()
        options = dict(option.split("=") for option in head["options"].split())
        if head["kind"] == "markdown":
            source = re.sub(r"^# ?", "", source, flags=re.M)
        wanted = {name: value.split(",") for name, value in options.items()}
        cells.append(Cell(head["kind"], source, head["task"] or "", wanted))
    return Master(lab, cells)


def blank(solution: str) -> str:
    """A solution's source with what the student is to write taken out."""

    def stub(match: re.Match) -> str:
        return "\n".join(match[1] + line for line in STUB.splitlines())

    return SOLUTION.sub(stub, solution)


def notebook(master: Master, *, solutions: bool) -> NotebookNode:
    """The students' notebook, or with `solutions` the instructor's: the same but for what stands in the blanks."""
    book, tasks = v4.new_notebook(), master.tasks
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "exercises": {"lab": master.lab},
    }
    for number, cell in enumerate(master.cells):
        name = f"{cell.kind}-{cell.task or number}"
        if cell.kind == "markdown":
            own = [tasks[cell.task]] if cell.task in tasks else list(tasks.values())
            without = "、".join(f"`{name}`" for task in own for name in task.without)
            points = str(sum(task.points for task in own))
            made = v4.new_markdown_cell(cell.source.replace("{points}", points).replace("{without}", without))
        else:
            source = cell.source if solutions or cell.kind != "solution" else blank(cell.source)
            made = v4.new_code_cell(source)
            made.metadata = {"tags": [cell.kind]}
        if cell.kind in ("solution", "test"):
            made.metadata["nbgrader"] = _nbgrader(cell, tasks[cell.task])
        made.id = name
        book.cells.append(made)
    return book


def _nbgrader(cell: Cell, task: Task) -> dict:
    """What nbgrader wants to know of a cell."""
    test = cell.kind == "test"
    said = {"schema_version": 3, "grade_id": f"{cell.kind}-{cell.task}", "grade": test, "solution": not test}
    return said | {"locked": test, "task": False} | ({"points": task.points} if test else {})


def student_file(lab: str) -> Path:
    """Where a lab's exercises stand."""
    return next(CHAPTER.glob(f"Lab-{lab}-*")) / "Exercises.ipynb"


def solutions_file(lab: str) -> Path:
    """Where the instructor's notebook goes: a folder that git ignores."""
    return work_folder() / "exercises" / f"{lab}-Solutions.ipynb"


def text_of(book: NotebookNode) -> str:
    return nbformat.writes(book).rstrip("\n") + "\n"


def write(check: bool = False) -> list[Path]:
    """Write every lab's notebooks; the students' that were out of date (with `check`, without writing any)."""
    stale = []
    for lab in LABS:
        target, wanted = student_file(lab), text_of(notebook(load(lab), solutions=False))
        if not target.exists() or target.read_text(encoding="utf-8") != wanted:
            stale.append(target)
        if not check:
            solved = solutions_file(lab)
            solved.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(wanted, encoding="utf-8")
            solved.write_text(text_of(notebook(load(lab), solutions=True)), encoding="utf-8")
    return stale
