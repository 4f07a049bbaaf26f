"""A deck in a real Chromium, opened from a folder: keys, the printer, no request elsewhere."""

import re

import pytest

from tests.book_tools import open_page, require_sphinx
from tools.slides.__main__ import write
from tools.slides.deck import Slide
from tools.slides.page import page as deck

require_sphinx()  # Playwright comes with the book

pytestmark = pytest.mark.slow
SHEET = {"width": 1122, "height": 631}  # 297 x 167 mm, in CSS pixels
SHOWN = "[...document.querySelectorAll('section')].findIndex((s) => Math.abs(s.getBoundingClientRect().top) < 2)"
TOO_MUCH = (
    """[...document.querySelectorAll("section")].filter((s) => s.scrollHeight > s.clientHeight + 2).map((s) => s.id)"""
)


@pytest.fixture
def small(tmp_path):
    """A deck of five slides, one of them with far too much on it."""
    slides = [Slide("question", f"Step {i}", "<p>Why?</p>" * (16 if i == 3 else 1)) for i in range(5)]
    (tmp_path / "deck.html").write_text(deck("A", slides), encoding="utf-8")
    return tmp_path / "deck.html"


def test_keys_turn_the_pages(small, page):
    page.set_viewport_size(SHEET)
    open_page(page, small)
    turns = [("ArrowRight", 1), ("Space", 2), ("ArrowDown", 3), ("PageDown", 4), ("ArrowRight", 4)]
    turns += [("ArrowLeft", 3), ("ArrowUp", 2), ("PageUp", 1), ("Home", 0), ("ArrowLeft", 0), ("End", 4)]
    for key, wanted in turns:
        page.keyboard.press(key)
        page.wait_for_function(f"({SHOWN}) === {wanted}")
    page.keyboard.press("f")
    page.wait_for_function("document.fullscreenElement")
    page.keyboard.press("f")
    page.wait_for_function("!document.fullscreenElement")
    assert page.complaints == []


def test_a_slide_with_too_much_is_shown_smaller_and_the_others_are_not(small, page):
    page.set_viewport_size(SHEET)
    open_page(page, small)
    assert page.evaluate(TOO_MUCH) == []
    zooms = page.evaluate("[...document.querySelectorAll('section > div')].map((d) => Number(d.style.zoom))")
    assert zooms[3] < 1 and zooms.count(1) == 4


def test_a_labs_deck_prints_a_slide_a_sheet_and_asks_nobody(page, tmp_path):
    file = write("3.1", tmp_path)
    page.set_viewport_size(SHEET)
    open_page(page, file)
    page.emulate_media(media="print")
    page.wait_for_timeout(300)
    assert page.evaluate(TOO_MUCH) == []
    printed = page.pdf(prefer_css_page_size=True, print_background=True)
    assert len(re.findall(rb"/Type\s*/Page\b(?!s)", printed)) == page.locator("section").count() > 50
    assert page.complaints == []
