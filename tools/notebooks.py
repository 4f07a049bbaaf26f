"""The chapter's notebooks: which there are, what they are called, which of them need what others make."""

import re
from pathlib import Path

import nbformat

from common.course.settings import CHAPTER, ROOT

LAB_OF_FOLDER = {
    "Lab-3.1-Quantization": "quantization",
    "Lab-3.2-Pruning": "pruning",
    "Lab-3.3-Distillation": "distillation",
    "Advanced": "advanced",
}
PATTERNS = ("Lab-*/[0-9]*.ipynb", "Advanced/A*.ipynb")  # not Exercises.ipynb
NAMED = re.compile(r"""["']((?:Lab-[\d.]+-\w+|Advanced)/\w+(?:-\w+)*)["']""")


def find_notebooks(lab: str = "", notebook: str = "") -> list[Path]:
    """The chapter's notebooks in order; `lab` ("3.1", or "A" for Advanced) and `notebook` ("02") narrow them down."""
    everything = [path for pattern in PATTERNS for path in sorted(CHAPTER.glob(pattern))]
    found = [path for path in everything if lab_number(path).startswith(lab) and path.stem.startswith(notebook)]
    if not found:
        known = ", ".join(map(title, everything))
        raise FileNotFoundError(f"No notebook matches --lab {lab!r} --notebook {notebook!r}. There are: {known}.")
    return found


def lab_number(notebook: Path) -> str:
    """As `--lab` takes it: "3.1" of Lab-3.1-Quantization, "A" of Advanced."""
    return "A" if notebook.parent.name == "Advanced" else notebook.parent.name.split("-")[1]


def title(notebook: Path) -> str:
    return f"{notebook.parent.name}/{notebook.stem}"


def shown(path: Path) -> str:
    """A path as seen from the repository."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def code(notebook: Path) -> str:
    """The source of all code cells."""
    cells = nbformat.read(notebook, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def needs(notebook: Path) -> list[str]:
    """Titles of the notebooks whose artifacts this one loads: those that its code names (`made_by=`)."""
    return [name for name in sorted(set(NAMED.findall(code(notebook)))) if name != title(notebook)]
