"""The grader on trial: every task's checks against planted faults, which must cost points, against answers that do
nothing, which must get none, and against correct answers written otherwise, which must get all. What came out stands in
results/exercises.json and in the instructor's page.
"""

import contextlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path

from common.course.exercises import untouched
from common.course.settings import ROOT
from tools.exercises.grade import Checker, mark_task, run_checks
from tools.exercises.master import LABS, Master, Task, load

FILE = ROOT / "results" / "exercises.json"
WHO = ("trial 1", "trial 2")  # students whose inputs are drawn
Change = list[tuple[str, str]] | str  # replacements in the solution's source, or a whole source


def changed(solution: str, change: Change) -> str:
    """A solution's source after a change. Raises ValueError where there is nothing to replace."""
    if isinstance(change, str):
        return change
    for old, new in change:
        if old not in solution:
            raise ValueError(f"The solution does not hold {old!r}.")
        solution = solution.replace(old, new)
    return solution


def points(master: Master, checker: Checker, task: Task, source: str) -> int:
    """What an answer gets with the worst of WHO. It runs here, so it must be one that ends; where a task needs a
    package, in a process of its own, which that package then cannot outlive."""
    if task.needs:
        return min(mark_task(master, checker, task, source, who, "").gained for who in WHO)
    wanted, checks = checker.checks(task)
    names: dict[str, Callable] = {"__name__": "answer"}
    with contextlib.suppress(Exception):  # then functions are missing, and their checks fail
        exec(f"{master.before(task)}\n\n{source}", names)
    functions = [untouched(names[name]) for name in wanted if name in names]
    return min(sum(mark.gained for mark in run_checks(checks, functions, who, "")) for who in WHO)


def run(lab: str) -> dict[str, dict]:
    """Points by task: of each fault, of each answer that does nothing and of each variant.

    What is recorded stays for a task that needs a package which is not installed.
    """
    master, trials = load(lab), importlib.import_module(f"tools.exercises.trials_{lab.replace('.', '_')}")
    checker, outcome = Checker(master), {}
    for name, task in master.tasks.items():
        if task.lacking:
            outcome[name] = json.loads(FILE.read_text(encoding="utf-8"))[lab][name]
            continue
        outcome[name] = {"title": task.title, "points": task.points}
        kinds = {
            "faults": trials.FAULTS[name],
            "nothing": trials.NOTHING.get(name, {}),
            "variants": trials.VARIANTS[name],
        }
        for kind, changes in kinds.items():
            outcome[name][kind] = {
                what: points(master, checker, task, changed(task.solution, change)) for what, change in changes.items()
            }
    return outcome


def write(check: bool = False) -> list[Path]:
    """Run all trials and keep what came out; [FILE] where that is not what was there."""
    content = json.dumps({lab: run(lab) for lab in LABS}, ensure_ascii=False, indent=1) + "\n"
    if FILE.exists() and FILE.read_text(encoding="utf-8") == content:
        return []
    if not check:
        FILE.write_text(content, encoding="utf-8")
    return [FILE]


def table() -> str:
    """A Markdown table: how many faults lost points, idle answers got none, correct variants kept all."""
    recorded = json.loads(FILE.read_text(encoding="utf-8"))
    lines = ["| Lab | 題目 | 分數 | 埋的錯，扣到分／全部 | 什麼都沒做，0 分／全部 | 正確的寫法，滿分／全部 |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for lab, tasks in recorded.items():
        for task in tasks.values():
            caught = sum(gained < task["points"] for gained in task["faults"].values())
            kept = sum(gained == task["points"] for gained in task["variants"].values())
            idle = list(task["nothing"].values())
            none = f"{idle.count(0)} / {len(idle)}" if idle else "—"
            counts = f"{caught} / {len(task['faults'])} | {none} | {kept} / {len(task['variants'])}"
            lines.append(f"| {lab} | {task['title']} | {task['points']} | {counts} |")
    return "\n".join(lines) + "\n\n*來源：`results/exercises.json`，由 `python -m tools.exercises trials` 寫成。*\n"
