"""A document of the course, and what a check finds in it."""

import json
from dataclasses import dataclass
from pathlib import Path

from common.course.settings import ROOT


@dataclass(frozen=True)
class Finding:
    """What a check says of one line."""

    place: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.place}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Document:
    """A Markdown file, or one Markdown cell of a notebook (then `cell` is its number, counted from 1)."""

    path: Path
    text: str
    cell: int = 0

    @property
    def name(self) -> str:
        """Its path from the repository's root."""
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.name

    def finding(self, position: int, message: str) -> Finding:
        """A finding at a position of the text."""
        place = f"{self.name}[cell {self.cell}]" if self.cell else self.name
        return Finding(place, self.text.count("\n", 0, position) + 1, message)


def read(path: Path) -> list[Document]:
    """A Markdown file as one document, a notebook as one per Markdown cell."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return [Document(path, text)]
    cells = enumerate(json.loads(text)["cells"], start=1)
    return [
        Document(path, "".join(cell["source"]), number) for number, cell in cells if cell["cell_type"] == "markdown"
    ]
