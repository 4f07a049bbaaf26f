"""Shared by the book's tests: the built site, a Chromium, and a page that remembers what went wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.course.settings import ROOT
from tests.book_tools import ALLOWED
from tools import debian


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The book, built from the files as they are; BOOK names one that is built already."""
    if built := os.environ.get("BOOK"):
        return Path(built).resolve()
    out = tmp_path_factory.mktemp("book")
    done = subprocess.run([sys.executable, "-m", "tools.book", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def browser():
    """Where Chromium cannot be had the test is skipped; in `make test` on Debian it fails."""
    from playwright.sync_api import sync_playwright

    from tools.book.browser import chromium

    try:
        program = chromium()
    except debian.NotToBeHad as error:
        if os.environ.get("COURSE_ENGINES") and debian.shutil.which("apt-get"):
            raise
        pytest.skip(str(error))
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=program.path, env=program.environment)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A page that remembers what went wrong: `page.complaints`."""
    context = browser.new_context(reduced_motion="reduce", viewport={"width": 1000, "height": 800})
    opened = context.new_page()
    opened.complaints = []
    opened.on("console", lambda m: m.type in ("error", "warning") and opened.complaints.append(m.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("requestfailed", lambda r: opened.complaints.append(f"not to be had: {r.url}"))
    opened.on("request", lambda r: r.url.startswith(ALLOWED) or opened.complaints.append(f"asked elsewhere: {r.url}"))
    yield opened
    context.close()
