"""For the book's tests: what they need comes with `make book`; in `make test` they fail without it, else they skip."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

ALLOWED = ("file:", "data:", "blob:")


def require_sphinx() -> None:
    """Skip the module that calls this where the book's packages are not installed."""
    if find_spec("sphinx") is None and not os.environ.get("COURSE_ENGINES"):
        pytest.skip("The book's packages are not installed: make book", allow_module_level=True)


def open_page(page, file: Path, query: str = "") -> None:
    """Open a file of the book, and wait until its diagrams and formulas are drawn."""
    page.goto(file.as_uri() + query, wait_until="load")
    page.evaluate("""async () => {
        if (window.MathJax) await MathJax.startup?.promise;
        while (document.querySelector("pre.mermaid") && !document.documentElement.dataset.diagrams)
            await new Promise(requestAnimationFrame);
    }""")
