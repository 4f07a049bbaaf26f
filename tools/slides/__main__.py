"""One deck a lab, made of its notebooks.

python -m tools.slides [--lab 3.1]
"""

import argparse
from pathlib import Path

from common.course.files import write_whole
from common.course.settings import work_folder
from tools.exercises.master import LABS
from tools.notebooks import find_notebooks, shown
from tools.slides.deck import slides_of
from tools.slides.page import page


def write(lab: str, folder: Path) -> Path:
    """Write a lab's deck into a folder."""
    file = folder / f"{lab}.html"
    slides = [slide for notebook in find_notebooks(lab) for slide in slides_of(notebook)]
    write_whole(file, page(f"Lab {lab}", slides))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description="Make slides of the notebooks.")
    parser.add_argument("--lab", choices=LABS, help="only this one")
    lab = parser.parse_args().lab
    for one in [lab] if lab else LABS:
        print(shown(write(one, work_folder() / "slides")))


if __name__ == "__main__":
    main()
