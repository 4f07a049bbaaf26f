"""The exercises' commands: write the notebooks from their masters, grade submissions, try the grader.

python -m tools.exercises write [--check]
python -m tools.exercises grade --lab 3.1 [--secret ...] [file or folder]
python -m tools.exercises trials [--check]
"""

import argparse
import hashlib
import sys
from pathlib import Path

from common.course.settings import ROOT, work_folder
from tools.exercises import grade, master, sheet, trials
from tools.notebooks import shown


def submissions(place: Path) -> list[Path]:
    """The notebooks to mark: one file, or all in a folder. Raises FileNotFoundError where there are none."""
    if place.is_dir():
        found = sorted(path for path in place.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    else:
        found = [place] if place.exists() else []
    if not found:
        raise FileNotFoundError(f"{place} is no notebook, and no folder that holds any.")
    return found


def mark_all(lab: str, place: Path, secret: str, folder: Path) -> list[grade.Marks]:
    """Mark submissions, a line for each as it is done, and write the sheets."""
    chosen = master.load(lab)
    checker, marks = grade.Checker(chosen), []
    for file in submissions(place):
        marks.append(grade.mark(file, chosen, checker, secret))
        print(f"{marks[-1].gained:>4} / {marks[-1].points}  {marks[-1].student}  ({file.name})", flush=True)
    for one in marks:
        namesakes = [other.file for other in marks if other.student == one.student and other is not one]
        if namesakes:
            one.notes.append(f"The same student as in {', '.join(namesakes)}.")
    sheet.write(folder, marks)
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the exercises, grade them, or try the grader.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("write", "trials"):
        commands.add_parser(name).add_argument("--check", action="store_true", help="change nothing; exit 1 if stale")
    marking = commands.add_parser("grade")
    marking.add_argument("--lab", choices=master.LABS, required=True)
    marking.add_argument("--secret", default="", help="anything that students do not know; adds the hidden inputs")
    marking.add_argument("place", nargs="?", type=Path, help="a notebook, or a folder of them")
    arguments = parser.parse_args()
    if arguments.command == "grade":
        folder = work_folder() / "grades" / arguments.lab
        secret = hashlib.sha256(arguments.secret.encode()).hexdigest() if arguments.secret else ""
        try:
            mark_all(arguments.lab, arguments.place or master.student_file(arguments.lab), secret, folder)
        except FileNotFoundError as error:
            sys.exit(str(error))
        print(f"\n{shown(folder)}/sheet.html, sheet.csv, sheet.json")
        return
    stale = (master if arguments.command == "write" else trials).write(check=arguments.check)
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is out of date: make exercises' if arguments.check else 'written'}")
    sys.exit(1 if arguments.check and stale else 0)


if __name__ == "__main__":
    main()
