"""A notebook as slides: for every step the question and the guess, then what came out and what it means.

Nothing is typed here: prose, pictures and tables are those that the notebook holds and has recorded.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from markdown_it import MarkdownIt

from tools.documents.markdown import FORMULA

HEADING = re.compile(r"^#{1,3} +(.+)$")
GUESS = "**先猜**"
LEFT_OUT = ("參數 (Parameters)",)  # sections of a notebook that a lecture does not need
BLOCKS = 3  # of prose on a slide: who wants more reads the notebook
LINES = 14  # of printed text on a slide
PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Slide:
    """One page: `kind` is "title", "question" or "answer"; the body is HTML."""

    kind: str
    title: str
    body: str


def rendered(markdown: str) -> str:
    """HTML of a piece of a notebook's prose, formulas as MathML. Links lose their targets: a deck stands alone."""
    formulas: list[str] = []

    def aside(match: re.Match) -> str:
        display = match[0].startswith("$$")
        formulas.append(convert(match[0].strip("$").strip(), display="block" if display else "inline"))
        return f"\ue000{len(formulas) - 1}\ue001"

    page = PARSER.render(FORMULA.sub(aside, markdown))
    page = re.sub(r"</?a\b[^>]*>|<img\b[^>]*>", "", page)
    return re.sub("\ue000(\\d+)\ue001", lambda match: formulas[int(match[1])], page)


def shown(output) -> str:
    """HTML of what a cell put out; "" where there is nothing to show."""
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"].split())}">'
    if "text/html" in data:
        return re.sub(r"<(style|script)\b.*?</\1>", "", data["text/html"], flags=re.S)
    text = output.get("text") or data.get("text/plain", "")
    if output.output_type == "error" or not text.strip() or "image/svg+xml" in data:
        return ""
    lines = text.strip("\n").splitlines()
    more = ["…"] if len(lines) > LINES else []
    return f"<pre>{html.escape(chr(10).join(lines[:LINES] + more))}</pre>"


def slides_of(notebook: Path) -> list[Slide]:
    """A notebook's slides, in order."""
    slides: list[Slide] = []
    title, prose, outputs, ran = notebook.stem, [], [], False

    def turn() -> None:
        """Make a slide of what has gathered: what came before a cell asks, what came after it answers."""
        nonlocal prose, outputs, ran
        body = "".join(outputs) + "".join(map(rendered, _some(prose)))
        if body and title not in LEFT_OUT:
            slides.append(Slide("answer" if ran else "question" if slides else "title", title, body))
        prose, outputs, ran = [], [], False

    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            if prose:
                turn()
            outputs += [page for page in map(shown, cell.outputs) if page]
            ran = True
        for block in _blocks(cell.source) if cell.cell_type == "markdown" else []:
            heading = HEADING.match(block)
            if heading or (block.startswith(GUESS) and ran):
                turn()
            if heading:
                title = heading[1]
            else:
                prose.append(block)
    turn()
    return slides


def steps(notebook: Path) -> list[str]:
    """Headings of the steps of a notebook."""
    cells = nbformat.read(notebook, as_version=4).cells
    return [
        step
        for cell in cells
        if cell.cell_type == "markdown"
        for step in re.findall(r"^## (Step .+)$", cell.source, re.M)
    ]


def _blocks(source: str) -> list[str]:
    """Paragraphs, lists, tables and formulas of a cell; code in fences is left out."""
    source = re.sub(r"^```.*?^```$", "", source, flags=re.M | re.S)
    source = re.sub(r"</?(?:details|summary)\b[^>]*>", "", source)
    lines = re.sub(r"^(#{1,3} .+)$", r"\n\n\1\n\n", source, flags=re.M)
    return [block.strip() for block in re.split(r"\n\s*\n", lines) if block.strip()]


def _some(prose: list[str]) -> list[str]:
    """The first blocks of a slide's prose; its guess always."""
    guesses = [block for block in prose if block.startswith(GUESS)]
    return [block for block in prose if block not in guesses][: BLOCKS - len(guesses)] + guesses
