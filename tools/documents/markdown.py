"""The course's Markdown as the checks of `documents` see it: documents and notebook cells, with code, formulas
and rendered tables blanked out where a check is about prose."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from common.course.settings import ROOT

FENCE = re.compile(
    r"^(?P<indent>[ >]*)(?P<mark>```+|~~~+)(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^[ >]*(?P=mark) *$", re.M | re.S
)
REGION = re.compile(r"<!-- results:[\w-]+ -->.*?<!-- /results -->", re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)[^\n]+?(?<!`)\1(?!`)")
FORMULA = re.compile(r"\$\$.+?\$\$|(?<![\\$])\$(?![\s$])[^$\n]+?\$", re.S)
HEADING = re.compile(r"^(#{1,6}) +(.+?) *#*$", re.M)
LINK = re.compile(
    r"(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?((?:[^\s()<>]|\([^\s()]*\))+)>?(?: +\"[^\"]*\")?\)"
    r"|<(?:a|img)\b[^>]*?(?:href|src)=\"([^\"]+)\""
)
ANCHOR = re.compile(r"<a [^>]*?(?:id|name)=\"([^\"]+)\"")
FRAGMENT = re.compile(r"<!-- fragment: \S.* -->\s*$")


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


def without(text: str, *patterns: re.Pattern) -> str:
    """The text with every match turned into blanks, so that all positions and lines stay where they are."""
    for pattern in patterns:
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def prose(text: str) -> str:
    """The text without code, comments and formulas."""
    return without(text, FENCE, COMMENT, INLINE_CODE, FORMULA)


def headings(text: str) -> list[re.Match]:
    """Headings outside code; group 1 is the marks, group 2 the text."""
    return list(HEADING.finditer(without(text, FENCE, COMMENT)))


def sections(text: str, pattern: str) -> Iterator[tuple[int, str]]:
    """Position and text of every section, subsections included, whose heading matches."""
    found = headings(text)
    for number, heading in enumerate(found):
        if re.search(pattern, heading[2]):
            after = (later.start() for later in found[number + 1 :] if len(later[1]) <= len(heading[1]))
            yield heading.start(), text[heading.start() : next(after, len(text))]


def slug(heading: str) -> str:
    """GitHub's anchor for a heading: lower case, punctuation gone, blanks to hyphens."""
    shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """What `path#...` may name: headings as GitHub writes them (repeated ones numbered) and <a id>; in a notebook,
    headings as Jupyter does (blanks to hyphens, nothing else changed); in code, its lines."""
    if path.suffix not in (".md", ".ipynb"):
        return {f"L{number}" for number, _ in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)}
    found: dict[str, int] = {}
    names = set()
    for document in read(path):
        names.update(ANCHOR.findall(document.text))
        for heading in headings(document.text):
            base = slug(heading[2]) if path.suffix == ".md" else heading[2].replace(" ", "-")
            seen = found[base] = found.get(base, -1) + 1
            names.add(f"{base}-{seen}" if seen else base)
    return names


def links(text: str) -> Iterator[tuple[int, bool, str]]:
    """Position, whether it is an image, and target of every link outside code."""
    for match in LINK.finditer(without(text, FENCE, COMMENT, INLINE_CODE)):
        yield match.start(), match[1] == "!" or match[0].startswith("<img"), match[2] or match[3]


def python_blocks(text: str) -> Iterator[tuple[int, str, bool]]:
    """Position of its code, code, and whether it is marked as a fragment, of every fenced Python block."""
    for match in FENCE.finditer(text):
        if match["kind"] in ("python", "py"):
            quoted = re.sub(r"^> ?", "", match["code"], flags=re.M) if ">" in match["indent"] else match["code"]
            yield match.start("code"), dedent(quoted), bool(FRAGMENT.search(text[: match.start()]))


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, lists and tables (what blank lines part), with their positions."""
    for match in re.finditer(r"(?:^[^\n]*\S[^\n]*$\n?)+", text, re.M):
        yield match.start(), match[0]


def cells(row: str) -> list[str]:
    """The cells of a table's row; `\\|` does not part cells."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]
