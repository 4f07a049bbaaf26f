"""Pages that show a file of the repository with its lines, or what a folder holds."""

import html
import json
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx

from common.course.settings import ROOT
from tools.book.links import source_page

RECORDS = sorted((ROOT / "results").glob("*/*.json"))
MOST = 200_000  # bytes of a file that is coloured


@cache
def tracked() -> list[Path]:
    """The files that git knows of, or all where this is no checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return sorted(
            path for path in ROOT.rglob("*") if path.is_file() and not any(p.startswith(".") for p in path.parts)
        )
    return [ROOT / name for name in done.stdout.split("\0") if name]


def wanted(env) -> list[Path]:
    """The files and folders that the book links to, and what is in those folders."""
    linked = set(RECORDS) | {path for found in env.book_links.values() for path in found.get("sources", ())}
    folders = {path for path in linked if path.is_dir()}
    for folder in list(folders):
        for path in tracked():
            if path.is_relative_to(folder):
                linked.add(path)
                linked.update(parent for parent in path.parents if parent.is_relative_to(folder))
    return sorted(linked)


def record_place(number: int) -> str:
    """The anchor of a file's record, counted from 0."""
    return f"record-{number}"


def _records(text: str) -> str:
    """Records, one a line."""
    lines = (
        f'<li id="{record_place(number)}"><code>{html.escape(json.dumps(record, ensure_ascii=False))}</code></li>'
        for number, record in enumerate(json.loads(text))
    )
    return f'<ol class="records">{"".join(lines)}</ol>'


def body(path: Path, home: str) -> str:
    """The page's HTML; `home` is the way from it to the book's first page."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        below = sorted({entry for entry in path.iterdir() if any(t.is_relative_to(entry) for t in tracked())})
        items = "".join(
            f'<li><a href="{home}{source_page(entry)}.html">{html.escape(entry.name)}{"/" * entry.is_dir()}</a></li>'
            for entry in below
        )
        return f"<h1><code>{html.escape(name)}/</code></h1><ul>{items}</ul>"
    text = path.read_text(encoding="utf-8", errors="replace")
    if path in RECORDS:
        return f"<h1><code>{html.escape(name)}</code></h1>{_records(text)}"
    try:
        lexer = get_lexer_for_filename(path.name) if len(text) < MOST else TextLexer()
    except ClassNotFound:
        lexer = TextLexer()
    shown = highlight(text, lexer, HtmlFormatter(lineanchors="L", anchorlinenos=True, linenos="inline", wrapcode=True))
    return f"<h1><code>{html.escape(name)}</code></h1>{shown}"


def pages(app: Sphinx) -> Iterator[tuple[str, dict, str]]:
    for path in wanted(app.env):
        page = source_page(path)
        home = app.builder.get_relative_uri(page, "README").removesuffix("README.html")
        context = {"title": path.relative_to(ROOT).as_posix(), "body": body(path, home), "parents": [], "meta": {}}
        yield page, context, "page.html"
