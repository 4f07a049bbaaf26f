"""The course's Markdown as the checks of `documents` see it: documents and notebook cells, with code, formulas
and rendered tables blanked out where a check is about prose.

markdown-it parses it. What is no Markdown is found by patterns: comments, the marks of ours in them, and formulas.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, backtick
from markdown_it.token import Token

from tools.documents.document import read

REGION = re.compile(r"<!-- results:[\w-]+ -->.*?<!-- /results -->", re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
FORMULA = re.compile(r"\$\$.+?\$\$|(?<![\\$])\$(?![\s$])[^$\n]+?\$", re.S)
FRAGMENT = re.compile(r"<!-- fragment: \S.* -->\s*$")


# --- markdown-it -----------------------------------------------------------------------------------------------------


def _backtick(state: StateInline, silent: bool) -> bool:
    """markdown-it's rule for code in a line, which also notes the code as written, marks included."""
    start, before = state.pos, len(state.tokens)
    found = backtick(state, silent)
    if found and len(state.tokens) > before and state.tokens[-1].type == "code_inline":
        state.tokens[-1].meta["written"] = state.src[start : state.pos]
    return found


PARSER = MarkdownIt("commonmark").enable("table")
PARSER.inline.ruler.at("backticks", _backtick)
PARSER.normalizeLink = lambda url: url  # targets as they are written


@cache
def _parsed(text: str) -> tuple[list[Token], list[int]]:
    """The text's tokens, and where each of its lines begins (and the last one ends)."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    return PARSER.parse(text), [*starts[:-1], len(text)]


def _span(token: Token, starts: list[int]) -> tuple[int, int]:
    """Where a block's lines begin and end."""
    return starts[token.map[0]], starts[token.map[1]]


def _inline(text: str) -> Iterator[tuple[int, Token]]:
    """What stands within lines (text, code, links, HTML), each with the number of its line."""
    for block in _parsed(text)[0]:
        line = block.map[0] if block.map else 0
        for token in block.children or ():
            yield line, token
            line += token.type in ("softbreak", "hardbreak")


# --- what is blanked out ---------------------------------------------------------------------------------------------


def blanked(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """The text with spans turned into blanks, so that all positions and lines stay where they are."""
    parts, after = [], 0
    for start, end in sorted(spans):
        parts += [text[after:start], re.sub(r"[^\n]", " ", text[start:end])]
        after = end
    return "".join([*parts, text[after:]])


def without(text: str, *patterns: re.Pattern) -> str:
    """The text with every match of patterns blanked."""
    for pattern in patterns:
        text = blanked(text, [match.span() for match in pattern.finditer(text)])
    return text


def without_blocks_of_code(text: str) -> str:
    """The text with its fenced blocks blanked."""
    tokens, starts = _parsed(text)
    return blanked(text, [_span(token, starts) for token in tokens if token.type == "fence"])


def without_code_in_lines(text: str) -> str:
    """The text with the code that stands within its lines blanked."""
    starts, spans, after = _parsed(text)[1], [], 0
    for line, token in _inline(text):
        for part in token.meta.get("written", "").split("\n"):  # a quote's mark may stand before the next line
            for written in dict.fromkeys((part, part.replace("|", "\\|"))):  # a table's bar is escaped
                at = text.find(written, max(after, starts[line]))
                if part and at >= 0:
                    spans.append((at, after := at + len(written)))
                    break
    return blanked(text, spans)


def prose(text: str) -> str:
    """The text without code, comments and formulas."""
    return without(without_code_in_lines(without_blocks_of_code(text)), COMMENT, FORMULA)


# --- what stands in it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    start: int  # its position
    level: int
    text: str  # as it is written


def headings(text: str) -> list[Heading]:
    """All headings, in order."""
    tokens, starts = _parsed(text)
    return [
        Heading(starts[token.map[0]], int(token.tag[1]), inside.content)
        for token, inside in pairwise(tokens)
        if token.type == "heading_open"
    ]


def sections(text: str, pattern: str) -> Iterator[tuple[int, str]]:
    """Position and text of every section, subsections included, whose heading matches."""
    found = headings(text)
    for number, heading in enumerate(found):
        if re.search(pattern, heading.text):
            after = (later.start for later in found[number + 1 :] if later.level <= heading.level)
            yield heading.start, text[heading.start : next(after, len(text))]


def slug(heading: str) -> str:
    """GitHub's anchor for a heading: lower case, punctuation gone, blanks to hyphens."""
    shown = "".join(token.content for token in PARSER.parseInline(heading)[0].children)
    return re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """What `path#...` may name: headings as GitHub writes them (repeated ones numbered) and <a id>; in a notebook,
    headings as Jupyter does (blanks to hyphens, nothing else changed); in code, its lines."""
    if path.suffix not in (".md", ".ipynb"):
        return {f"L{number}" for number, _ in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)}
    found: dict[str, int] = {}
    names = set()
    for document in read(path):
        tags = [attributes for _, tag, attributes in _html(document.text) if tag == "a"]
        names.update(value for attributes in tags for key in ("id", "name") if (value := attributes.get(key)))
        for heading in headings(document.text):
            base = slug(heading.text) if path.suffix == ".md" else heading.text.replace(" ", "-")
            seen = found[base] = found.get(base, -1) + 1
            names.add(f"{base}-{seen}" if seen else base)
    return names


class _Tags(HTMLParser):
    """The opening tags of a piece of HTML: number of the line, name, attributes."""

    def __init__(self, html: str):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((self.getpos()[0] - 1, tag, dict(attributes)))


def _html(text: str) -> Iterator[tuple[int, str, dict[str, str | None]]]:
    """Line, name and attributes of every HTML tag."""
    pieces = [(token.map[0], token) for token in _parsed(text)[0] if token.type == "html_block"]
    pieces += [(line, token) for line, token in _inline(text) if token.type == "html_inline"]
    for line, token in pieces:
        for further, tag, attributes in _Tags(token.content).found:
            yield line + further, tag, attributes


def links(text: str) -> Iterator[tuple[int, bool, str]]:
    """Position of its line, whether it is an image, and target of every link."""
    starts = _parsed(text)[1]
    found = []
    for line, token in _inline(text):
        if target := token.attrs.get("href") or token.attrs.get("src"):
            found.append((line, token.type == "image", str(target)))
    for line, tag, attributes in _html(text):
        if target := attributes.get("href") or attributes.get("src"):
            found.append((line, tag == "img", target))
    for line, image, target in sorted(found):
        yield starts[line], image, target


def python_blocks(text: str) -> Iterator[tuple[int, str, bool]]:
    """Position of its code, code, and whether it is marked as a fragment, of every fenced Python block."""
    tokens, starts = _parsed(text)
    for token in tokens:
        if token.type == "fence" and token.info.split()[:1] in (["python"], ["py"]):
            begin = starts[token.map[0]]
            yield starts[token.map[0] + 1], token.content, bool(FRAGMENT.search(text[:begin]))


@dataclass(frozen=True)
class Row:
    start: int  # its position
    text: str  # its line
    cells: list[str]  # as they are written, without the escape of a bar


def tables_of(text: str) -> Iterator[list[Row]]:
    """The rows of every table, the head first."""
    tokens, starts = _parsed(text)
    rows: list[Row] = []
    for token in tokens:
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            start, end = _span(token, starts)
            rows.append(Row(start, text[start:end], []))
        elif token.type == "inline" and token.level and rows:
            rows[-1].cells.append(token.content)
        elif token.type == "table_close":
            yield rows
            rows = []


def codes(text: str) -> list[str]:
    """What stands as code within a line of Markdown."""
    return [token.content for token in PARSER.parseInline(text)[0].children if token.type == "code_inline"]


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, lists and tables (what blank lines part), with their positions."""
    for match in re.finditer(r"(?:^[^\n]*\S[^\n]*$\n?)+", text, re.M):
        yield match.start(), match[0]
