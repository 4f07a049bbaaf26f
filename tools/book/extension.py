"""What Sphinx lacks for this book: its contents, links among the repository's files, pages of code, origins, terms."""

import shutil
from importlib.util import find_spec
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.search import languages

from common.course.private import add_to_catalogue
from common.course.settings import ROOT
from tools.book import citations, contents, english, links, measured, origins, sources, terms, widgets
from tools.book.search import CharacterPairs

VENDOR = {  # what PyPI brings for the browser, and its name in the book
    "sphinx-mathjax-offline": ("static/mathjax/tex-svg-full.js", "mathjax.js"),
    "mermaidx": ("assets/mermaid.js", "mermaid.js"),
}

WORDS = {"Previous": "上一頁", "Next": "下一頁", "Home": "首頁", "On this page": "本頁內容"}


def _contents(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] += contents.toctree(docname)


def _context(app: Sphinx, pagename: str, template: str, context: dict, doctree) -> None:
    context["language_pages"] = english.pages()
    if english.is_english(pagename):
        context["body"] = f'<div lang="en">{context["body"]}</div>'


def _chinese(app: Sphinx) -> None:
    """What the theme says in English, for want of a catalogue."""
    add_to_catalogue(WORDS)


def _forget(app: Sphinx, env, docname: str) -> None:
    env.book_links.pop(docname, None)


def _begin(app: Sphinx, env, docnames: list[str]) -> None:
    if not hasattr(env, "book_links"):
        env.book_links = {}


def _merge(app: Sphinx, env, docnames: list[str], other) -> None:
    env.book_links.update({name: found for name, found in other.book_links.items() if name in docnames})


def _finish(app: Sphinx, error: Exception | None) -> None:
    if error:
        return
    out = Path(app.outdir)
    (out / "_static" / "vendor").mkdir(parents=True, exist_ok=True)
    for package, (file, name) in VENDOR.items():
        folder = Path(find_spec(package).submodule_search_locations[0])
        shutil.copy(folder / file, out / "_static" / "vendor" / name)
    measured.write(out / "_static" / "data")
    shutil.copy(out / "README.html", out / "index.html")
    for notebook in ROOT.glob("03-Model_Compression/*/*.ipynb"):
        shutil.copy(notebook, out / notebook.relative_to(ROOT))


def setup(app: Sphinx) -> dict:
    languages[CharacterPairs.lang] = CharacterPairs
    app.connect("builder-inited", _chinese)
    app.connect("env-before-read-docs", _begin)
    app.connect("source-read", _contents)
    app.connect("env-purge-doc", _forget)
    app.connect("env-merge-info", _merge)
    app.connect("html-collect-pages", sources.pages)
    app.connect("html-page-context", _context)
    app.connect("build-finished", _finish)
    app.add_directive("glossary-list", terms.GlossaryList)
    app.add_directive("widget", widgets.Widget)
    for transform in (links.WithinTheBook, origins.Origins, origins.Diagrams, citations.Citations, terms.FirstUse):
        app.add_transform(transform)
    for transform in (links.Anchors, citations.CitedBy):
        app.add_post_transform(transform)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
