"""Marks a submission: every task's checks, from the master, on inputs from the student's name and a secret.

A check gives its points when it holds on the inputs that the student sees, and, where there is a secret, on HIDDEN
other draws. Each answer runs in a process of its own (`tools.exercises.sandbox`).
"""

import ast
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nbformat

from common.course.exercises import Check, generator, in_vain
from tools.exercises.master import Master, Task, notebook
from tools.exercises.rules import broken, replaced
from tools.exercises.sandbox import GIB, Sandbox, Stopped

HIDDEN = 3  # draws of a check's inputs that only the instructor knows
PLACEHOLDER, EXAMPLE = "your name or number", 'STUDENT = "b12345678"'
SECONDS, MEMORY = 20.0, 2 * GIB  # for one call of an answer's function


@dataclass(frozen=True)
class Mark:
    """One check: its points if it held; a message where it did not."""

    check: str
    points: int
    gained: int
    message: str = ""


@dataclass
class TaskMarks:
    """One task's marks, and what is to be told of it besides."""

    name: str
    title: str
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        return sum(mark.points for mark in self.marks)

    @property
    def gained(self) -> int:
        return sum(mark.gained for mark in self.marks)


@dataclass
class Marks:
    """A submission's marks."""

    student: str
    file: str
    lab: str
    tasks: list[TaskMarks]
    notes: list[str]
    hidden: bool
    seconds: float = 0.0

    @property
    def points(self) -> int:
        return sum(task.points for task in self.tasks)

    @property
    def gained(self) -> int:
        return sum(task.gained for task in self.tasks)


class Checker:
    """A master's checks, with the functions they are for bound later."""

    def __init__(self, master: Master):
        self.names: dict[str, Any] = {"__name__": "checks"}
        exec(master.source("given", "checker"), self.names)

    def checks(self, task: Task) -> tuple[list[str], list[Check]]:
        """Names of the functions that a task asks for, and its checks."""
        call = next(
            node
            for node in ast.walk(ast.parse(task.test))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "try_out"
        )
        wanted = [element.id for element in call.args[1].elts]
        found: list[Check] = []
        collect = {"STUDENT": "", "try_out": lambda _, __, *given, **___: found.extend(given)}
        exec(task.test, self.names | dict.fromkeys(wanted) | collect)
        return wanted, found


def run_check(check: Check, functions: list[Callable], who: str, secret: str) -> Mark:
    """One check on the student's draw and, with a secret, on hidden ones; stops at the first that fails."""
    draws = [who, *(f"{secret}/{who}/{number}" for number in range(HIDDEN if secret else 0))]
    for number, draw in enumerate(draws):
        try:
            check(*functions, generator(check, draw))
        except NotImplementedError:
            return Mark(check.__doc__, check.points, 0, "Not written yet.")
        except AssertionError as error:
            where = "" if number == 0 else "On hidden inputs: "
            return Mark(check.__doc__, check.points, 0, where + str(error))
        except Exception as error:  # the check choked on what it was given
            message = f"What the function returned cannot be checked ({type(error).__name__}: {error})."
            return Mark(check.__doc__, check.points, 0, message)
    return Mark(check.__doc__, check.points, check.points)


def run_checks(checks: list[Check], functions: list[Callable], who: str, secret: str) -> list[Mark]:
    """A mark for each check; some give their points only after another gave its own."""
    marks, passed = [], []
    for check in checks:
        mark = run_check(check, functions, who, secret)
        why = in_vain(check, passed) if mark.gained else ""
        if mark.gained and not why:
            passed.append(check)
        marks.append(replace(mark, gained=0, message=why) if why else mark)
    return marks


def mark_task(master: Master, checker: Checker, task: Task, cell: str, who: str, secret: str, **limits) -> TaskMarks:
    """Marks for one task's cell."""
    made = TaskMarks(task.name, task.title)
    wanted, checks = checker.checks(task)
    if task.lacking:
        made.marks = [Mark(check.__doc__, 0, 0, task.lacking) for check in checks]
        return made
    if rule := broken(cell, task.without):
        made.marks = [Mark(check.__doc__, check.points, 0, rule) for check in checks]
        made.notes.append(rule)
        return made
    allowed = {"seconds": SECONDS, "memory": MEMORY} | limits
    try:
        with Sandbox(master.before(task), cell, **allowed) as sandbox:
            functions = [_remote(sandbox, name) for name in wanted]
            made.marks = run_checks(checks, functions, who, secret)
            if sandbox.stopped:
                made.notes.append(sandbox.stopped)
    except (AssertionError, NotImplementedError) as error:  # the cell itself, before any call
        message = str(error) or "Not written yet."
        made.marks = [Mark(check.__doc__, check.points, 0, message) for check in checks]
        made.notes += [message] if isinstance(error, Stopped) else []
    return made


def _remote(sandbox: Sandbox, name: str) -> Callable:
    return lambda *args, **kwargs: sandbox.call(name, args, kwargs)


def mark(file: Path, master: Master, checker: Checker, secret: str = "", **limits) -> Marks:
    """Marks of a submitted notebook. What was deleted or changed in it is told; the master's checks are run anyway."""
    start, notes = time.monotonic(), []
    try:
        cells = nbformat.read(file, as_version=4).cells
    except Exception as error:
        cells, notes = [], [f"The file is no notebook ({type(error).__name__})."]
    found: dict[str, list[str]] = {}
    for cell in cells:
        found.setdefault(_id(cell), []).append(cell.source)
    tasks = []
    original = {cell.id: cell.source for cell in notebook(master, solutions=False).cells}
    who, told = _student(cells)
    if not who:
        who = file.stem
        told += f" The file's name ({who}) stands in, so the inputs are not those of the notebook."
    notes += [told.strip()] if told else []
    notes += _elsewhere(cells, original)
    for task in master.tasks.values():
        answers, tests = (found.get(f"{kind}-{task.name}", []) for kind in ("solution", "test"))
        marks = mark_task(master, checker, task, answers[0] if len(answers) == 1 else "", who, secret, **limits)
        if len(answers) != 1:
            state = "missing" if not answers else "there more than once"
            marks.notes.append(f"The answer's cell (solution-{task.name}) is {state}: do not delete or copy cells.")
        if tests != [original[f"test-{task.name}"]]:
            marks.notes.append("The test's cell is not the one handed out; the original was run.")
        tasks.append(marks)
    return Marks(
        who, f"{file.parent.name}/{file.name}", master.lab, tasks, notes, bool(secret), time.monotonic() - start
    )


def _id(cell) -> str:
    """A cell's name: nbgrader's metadata, which every editor keeps, else its id."""
    return cell.metadata.get("nbgrader", {}).get("grade_id") or cell.get("id", "")


def _student(cells: list) -> tuple[str, str]:
    """The value of STUDENT, "" where there is none to be found, and what is to be told of its cell."""
    sources = [cell.source for cell in cells if "student" in cell.metadata.get("tags", [])]
    if not sources:
        return "", "There is no cell with STUDENT." if cells else ""
    name, others = "", False
    try:
        for statement in ast.parse(sources[0]).body:
            match statement:
                case ast.Assign([ast.Name("STUDENT")], ast.Constant(str() | int() as value)):
                    name = str(value).strip()
                case _:
                    others = True
    except SyntaxError:
        return "", "The cell with STUDENT is not Python."
    if name in ("", PLACEHOLDER):
        return "", f"The cell with STUDENT gives no name: it should hold one line, such as {EXAMPLE}."
    return name, "The cell with STUDENT should hold this one line; what else it holds was not run." if others else ""


def _elsewhere(cells: list, original: dict[str, str]) -> list[str]:
    """What cells other than answers replace of what others use: harmless, since only answers run, but told."""
    own = (cell for cell in cells if cell.cell_type == "code" and not _id(cell).startswith("solution-"))
    names = {name for cell in own if cell.source != original.get(_id(cell)) for name in replaced(cell.source)}
    return [f"A cell that is no answer replaces {name}; it was not run." for name in sorted(names)]
